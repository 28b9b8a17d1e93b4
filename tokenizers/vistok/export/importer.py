"""Released weights to a tokenizer of ours: `vistok import-weights`."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vistok.checkpoints.load import load_weights
from vistok.core.errors import CheckpointError
from vistok.core.registry import resolve
from vistok.core.released_weights import Published
from vistok.export.exporter import check_out, place_export
from vistok.models.build import build_tokenizer

_FRESH = ("quantizer.stats.", "quantizer.usage.", "quantizer.initialized", "encoder.latent_means")


def import_weights(
    source: str,
    weights: Path,
    out: Path,
    image_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write released weights as an export, which `vistok.load`, `stage.*` and `init_from` take.

    Args:
        source: whose they are: the name of a registered importer, such as "titok".
        weights: a `.safetensors` file, or one of `torch.save`, which is read without running code;
            of a training checkpoint the averaged weights are taken, if it has some.
        out: folder to write; it appears whole or not at all.
        image_size: side in pixels, for weights that take any; None for the published one.
        overwrite: replace an export that is there.

    Returns:
        `out`.

    Raises:
        ConfigError: for a source that is not known, or an `out` that is there already.
        CheckpointError: if the file cannot be read, or holds other weights.
    """
    convert = resolve(source, kind="importer", key="source")
    check_out(out, overwrite)
    published = _read(weights, source)
    try:
        released = convert(published, image_size)
        published.finish()
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    config = {
        "tokenizer": released.tokenizer,
        "quantizer": released.quantizer,
        "data": {
            "image_size": released.tokenizer["image_size"],
            "channels": released.tokenizer["channels"],
            "val_crop": "adm_center",
        },
    }
    tokenizer = build_tokenizer(config).eval()
    fresh = {k: v for k, v in tokenizer.state_dict().items() if k.startswith(_FRESH)}
    load_weights(tokenizer, fresh | released.state, str(weights))
    place_export(tokenizer, config, out, metrics={})
    print(
        f"imported {weights} to {out}\n"
        f"  {type(tokenizer).__name__}, {tokenizer.num_tokens} tokens per image of "
        f"{tokenizer.image_size[0]}x{tokenizer.image_size[1]}\n"
        f'  python: vistok.load("{out}")'
    )
    return out


def _read(path: Path, source: str) -> Published:
    if not path.is_file():
        raise CheckpointError(f"weights={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            return Published(load_file(path), metadata, source)
        with torch.serialization.safe_globals([Namespace]):  # a training checkpoint's arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"weights={path}: refused, it holds more than tensors and plain values, or is damaged"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"weights={path}: cannot be read ({reason})") from error
    if isinstance(content, dict):
        content = content.get("ema", content.get("model", content))
    if isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values()):
        return Published(content, source=source)
    raise CheckpointError(f"weights={path}: holds no plain state_dict (names and tensors)")
