"""What a prior generates: conditions to draw for, and ids as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vistok.checkpoints.exports import tokenizer_hash
from vistok.checkpoints.load import load
from vistok.core.errors import DataError
from vistok.data.token_module import TokenDataModule
from vistok.metrics.image import to_uint8
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer
from vistok.priors.prior import Prior, Samples
from vistok.priors.sampling import Sampling


def load_decoder(place: str, wanted_hash: str, device: torch.device) -> Tokenizer:
    """Load the export that tokens were made with.

    Args:
        place: the export folder.
        wanted_hash: of the tokenizer, as the folder of tokens says; "" if it does not.
        device: where to put it.

    Raises:
        DataError: if the tokens are another tokenizer's.
    """
    found = tokenizer_hash(Path(place))
    if wanted_hash and found != wanted_hash:
        raise DataError(
            f"data.tokenizer={place}: is another tokenizer ({found[:12]}) than the one that made "
            f"the tokens ({wanted_hash[:12]}); use the export they were made with"
        )
    return load(place, device=device)


def conditions_for(prior: Prior, data: TokenDataModule, count: int) -> Tensor:
    """Return what to draw `count` images for: labels in turn, or captions of validation images."""
    if prior.told.kind == "label":
        return prior.condition([i % prior.told.num_classes for i in range(count)])
    if prior.told.kind == "caption":
        captions = data.first(count, training=False)["caption"]
        return prior.condition([captions[i % len(captions)] for i in range(count)])
    return prior.condition([None] * count)


def pictures_of(tokenizer: Tokenizer, samples: Samples) -> Tensor:
    """Decode ids to `(B, C, H, W)` uint8."""
    ids = samples.ids.to(tokenizer.device)
    if isinstance(tokenizer, FlexibleTokenizer):
        lengths = samples.lengths.clamp(min=1, max=ids.shape[1]).to(tokenizer.device)
        return to_uint8(tokenizer.detokenize(ids, lengths))
    return to_uint8(tokenizer.detokenize(ids))


def progressive(
    prior: Prior, tokenizer: Tokenizer, condition: Tensor, sampling: Sampling, first: int = 0
) -> Iterator[Tensor]:
    """Draw images and yield the pictures of what is there after every step.

    Of a flexible tokenizer every prefix is a code, so the pictures get finer with each token. Of
    another one what is still to come is decoded as id 0.

    Yields:
        `(B, C, H, W)` uint8.
    """
    most = prior.layout.num_tokens
    for samples in prior.stream(condition, sampling, first):
        if not isinstance(tokenizer, FlexibleTokenizer) and samples.ids.shape[1] < most:
            ids = torch.nn.functional.pad(samples.ids, (0, 0, 0, most - samples.ids.shape[1]))
            samples = Samples(ids, samples.lengths)
        yield pictures_of(tokenizer, samples)
