"""Quality against bytes: a tokenizer next to image codecs, on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.evaluation.codecs import (
    CODECS,
    COUNTED,
    SETTINGS,
    SHRINKS,
    TITLES,
    codec_curves,
)
from vistok.evaluation.engine import bar
from vistok.evaluation.measure import Measurement
from vistok.evaluation.pairs import Pairs
from vistok.metrics.content import ContentMetric
from vistok.metrics.image import ImageMetric, MeanPerImage

_CHUNK = 32  # images that a metric gets at a time

#: The codecs get the bytes of each number of tokens, and these multiples of the largest.
FACTORS = (2, 4, 8, 16)


def whole_bytes(bits: float) -> int:
    """Return the bytes that packed ids of so many bits take."""
    return math.ceil(bits / 8 - 1e-9)


def rate_distortion(
    pairs: Sequence[Pairs],
    metrics: Mapping[str, ImageMetric],
    bytes_of: Mapping[int, int],
    codecs: Sequence[str],
) -> dict[str, Any]:
    """Measure codecs, and the tokenizer on the same images, by all metrics.

    Args:
        pairs: images and what the tokenizer made of them, of one size.
        metrics: they are reset. Content is left out: it would cost a search in the originals for
            each codec and size.
        bytes_of: bytes of an image at each number of tokens.
        codecs: their names.

    Returns:
        `images` (how many), `tokenizer` (rows with `num_tokens` and `bytes`), and `codecs`: by
        how bytes are counted ("payload" without headers, "file" with them) and codec, rows of
        `max_bytes`, `payload_bytes`, `file_bytes` and each metric.
    """
    metrics = {k: m for k, m in metrics.items() if not isinstance(m, ContentMetric)}
    originals = _stack([image for pair in pairs for image in pair.originals])
    # The same tensors each time, so that networks look at the originals' once.
    chunks = list(originals.split(_CHUNK))

    def measured(made: Sequence[Tensor]) -> list[dict[str, float]]:
        return _measured(metrics, chunks, made)

    budgets = sorted(bytes_of)
    made = [_stack([i for pair in pairs for i in pair.reconstructions[b]]) for b in budgets]
    rows = [
        {"num_tokens": budget, "bytes": bytes_of[budget]} | numbers
        for budget, numbers in zip(budgets, measured(made), strict=True)
    ]
    largest = max(bytes_of.values())
    limits = {*bytes_of.values(), *(largest * factor for factor in FACTORS)}
    curves: dict[str, Any] = {counted: {} for counted in COUNTED}
    for codec in codecs:
        with bar(TITLES[codec], len(originals)) as advance:
            found = codec_curves(originals.cpu(), limits, codec, list(COUNTED), measured, advance)
        for counted, points in found.items():
            curves[counted][codec] = points
    return {"images": len(originals), "tokenizer": rows, "codecs": curves}


def _measured(
    metrics: Mapping[str, ImageMetric], chunks: Sequence[Tensor], made: Sequence[Tensor]
) -> list[dict[str, float]]:
    """Return the metrics of several sets of pictures of the same originals, by this rank alone."""
    means = {name: m for name, m in metrics.items() if isinstance(m, MeanPerImage)}
    measurements = [Measurement(means, lenient=True, alone=True) for _ in made]
    for number, chunk in enumerate(chunks):
        for measurement, pictures in zip(measurements, made, strict=True):
            measurement.update(chunk, _chunk(pictures, number, chunk))
    results = [measurement.compute() for measurement in measurements]
    others = {name: m for name, m in metrics.items() if name not in means}
    for found, pictures in zip(results, made, strict=True):
        for metric in others.values():  # which keep what they have seen
            metric.reset()
        measurement = Measurement(others, lenient=True, alone=True)
        for number, chunk in enumerate(chunks):
            measurement.update(chunk, _chunk(pictures, number, chunk))
        found |= measurement.compute()
    return results


def _chunk(pictures: Tensor, number: int, like: Tensor) -> Tensor:
    """Return the pictures of a chunk of originals, on its device."""
    return pictures[number * _CHUNK : number * _CHUNK + len(like)].to(like.device)


def _stack(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images))


def codec_settings(codecs: Sequence[str], images: int) -> dict[str, Any]:
    """Return what the numbers of the codecs depend on, besides their libraries' versions.

    Args:
        codecs: their names.
        images: that they are measured on, at most.
    """
    return {
        "settings": {name: SETTINGS[name] for name in CODECS if name in codecs},
        "images": images,
        "shrinks": list(SHRINKS),
        "factors": list(FACTORS),
        "chosen_by": "psnr",
        "counted": list(COUNTED.values()),
    }
