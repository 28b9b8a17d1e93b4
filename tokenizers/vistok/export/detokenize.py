"""Tokens back to pictures: `vistok detokenize`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vistok.checkpoints.exports import tokenizer_hash
from vistok.checkpoints.hub import find_export
from vistok.checkpoints.load import load
from vistok.core.console import say
from vistok.core.errors import ConfigError, DataError, as_written
from vistok.core.terminal import counted
from vistok.core.values import is_whole
from vistok.data.tokens import TokenFolder, TokenSample
from vistok.evaluation.inputs import choose_device
from vistok.evaluation.pictures import save_png
from vistok.export.formats.all import samples_of
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer


def detokenize(config: dict[str, Any]) -> int:
    """Write samples of a folder of tokens as PNG files.

    Args:
        config: resolved `configs/detokenize.yaml`.

    Returns:
        The number of pictures.

    Raises:
        ConfigError: for a value that cannot be.
        DataError: for tokens of another tokenizer, or damaged ones.
    """
    for key, least in (("first", 0), ("count", 1), ("batch_size", 1)):
        if not is_whole(config[key]) or config[key] < least:
            raise ConfigError(
                f"{key}={as_written(config[key])}: must be a whole number of at least {least}"
            )
    model, tokens = find_export(config["model"]), TokenFolder(config["tokens"])
    tokens.check_tokenizer(tokenizer_hash(model), f"model={config['model']}")
    tokenizer = load(model, device=choose_device(config["device"]))
    first, out = config["first"], Path(str(config["out"])).expanduser()
    if first >= len(tokens):
        raise ConfigError(f"first={first}: {tokens.path} has {counted(len(tokens), 'sample')}")
    samples = islice(samples_of(tokens, config["format"]), first, first + config["count"])
    number = first
    while batch := list(islice(samples, config["batch_size"])):
        for picture in pictures(tokenizer, batch):
            save_png(picture, out / f"{number:09d}.png")
            number += 1
    say(f"{out}: {counted(number - first, 'picture')}")
    return number - first


def pictures(tokenizer: Tokenizer, samples: list[TokenSample]) -> Iterator[torch.Tensor]:
    """Yield the picture of each sample, `(C, H, W)` uint8.

    Raises:
        DataError: if a sample has a number of tokens that is not a code's.
    """
    lengths = [len(sample.ids) for sample in samples]
    most = tokenizer.num_tokens
    flexible = isinstance(tokenizer, FlexibleTokenizer)
    for sample, length in zip(samples, lengths, strict=True):
        if not (1 <= length <= most if flexible else length == most):
            raise DataError(f"{sample.key or 'sample'}: {counted(length, 'token')} are not a code")
    ids = torch.zeros(len(samples), max(lengths), tokenizer.quantizer.num_indices, dtype=torch.long)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.ids)] = torch.from_numpy(sample.ids)
    if flexible:
        found = tokenizer.detokenize(ids, torch.tensor(lengths))
    else:
        found = tokenizer.detokenize(ids)
    yield from (found * 255).round().to(torch.uint8)
