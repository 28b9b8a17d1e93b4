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
from vistok.metrics.image import ImageMetric

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

    def measured(originals: Sequence[Tensor], pictures: Sequence[Tensor]) -> dict[str, float]:
        for metric in metrics.values():
            metric.reset()
            metric.sync_on_compute = False  # rank 0 is alone here
        measurement = Measurement(metrics, lenient=True)
        for start in range(0, len(originals), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            measurement.update(_stack(originals[chunk]), _stack(pictures[chunk]))
        return measurement.compute()

    originals = [image for pair in pairs for image in pair.originals]
    device = originals[0].device
    rows = []
    for budget in sorted(bytes_of):
        pictures = [image for pair in pairs for image in pair.reconstructions[budget]]
        row = {"num_tokens": budget, "bytes": bytes_of[budget]}
        rows.append(row | measured(originals, pictures))
    largest = max(bytes_of.values())
    limits = {*bytes_of.values(), *(largest * factor for factor in FACTORS)}
    curves: dict[str, Any] = {}
    for counted in COUNTED:
        curves[counted] = {}
        for codec in codecs:
            what = f"{TITLES[codec]} {COUNTED[counted]}"
            with bar(what, len(originals)) as advance:
                found = codec_curves(
                    _stack(originals).cpu(),
                    limits,
                    [codec],
                    counted,
                    lambda a, b: measured(list(a.to(device)), list(b.to(device))),
                    advance,
                )
            curves[counted] |= found
    return {"images": len(originals), "tokenizer": rows, "codecs": curves}


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
