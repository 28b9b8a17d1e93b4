"""What `metrics.json` says about how its numbers were made: protocol, model, machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import vistok
from vistok.core import ranks
from vistok.data.datamodule import VistokDataModule
from vistok.evaluation import protocol
from vistok.metrics.image import ImageMetric
from vistok.models.tokenizer import Tokenizer


def describe_protocol(
    tokenizer: Tokenizer,
    data: VistokDataModule,
    weights: str,
    precision: str,
    budgets: Sequence[int] = (),
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the protocol of a tokenizer on validation images, without metrics and count.

    Args:
        tokenizer: that is measured.
        data: its images, set up.
        weights: "ema" or "last".
        precision: of the networks.
        budgets: numbers of tokens that are measured in addition to all.
        sampling: further arguments of `detokenize`.
    """
    val = data.val_set
    places = range(len(val.source)) if val.members is None else val.members.tolist()
    crop = val.transform.crop
    return {
        "images": {
            "reference": protocol.reference_hash(
                (val.source.keys[i].decode(errors="surrogateescape") for i in places),
                (int(val.source.sizes[i]) for i in places),
            ),
            "height": data.image_size[0],
            "width": data.image_size[1],
            "channels": data.channels,
            "crop": crop,
            "kernel": protocol.KERNELS[crop],
        },
        "weights": weights,
        "num_tokens": "all",
        "budgets": list(budgets),
        "sampling": effective_sampling(tokenizer, sampling or {}),
        "conditions": [name for name in tokenizer.decoder.conditions if name in data.fields],
        "precision": precision,
    }


def whole_protocol(
    described: Mapping[str, Any], metrics: Mapping[str, ImageMetric]
) -> dict[str, Any]:
    """Return a protocol with its metrics, and what is the same for all measurements."""
    return {
        "format": protocol.FORMAT,
        **described,
        "images": dict(described["images"]),
        "rounding": protocol.ROUNDING,
        "metrics": {name: metric.identity() for name, metric in metrics.items()},
    }


def effective_sampling(tokenizer: Tokenizer, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a decoder samples with: those given, else its own."""
    decoder = tokenizer.decoder
    found = {name: given.get(name, getattr(decoder, name, None)) for name in decoder.sampling}
    return {k: v for k, v in found.items() if isinstance(v, (int, float, str, bool))}


def describe_model(tokenizer: Tokenizer, hashed: bool = True) -> dict[str, Any]:
    """Return what a tokenizer is, for people and for `compare`.

    Args:
        tokenizer: any.
        hashed: with the SHA-256 of its weights, which must not be sharded.
    """
    quantizer = tokenizer.quantizer
    digest = {"sha256": protocol.weights_hash(tokenizer)} if hashed else {}
    return {
        "tokenizer": type(tokenizer).__name__,
        "quantizer": type(quantizer).__name__,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "num_tokens": tokenizer.num_tokens,
        "codebook_sizes": list(quantizer.codebook_sizes),
        **digest,
    }


def describe_machine(batch_size: int, device: torch.device) -> dict[str, Any]:
    """Return what a measurement ran on, which its numbers should not depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "vistok": vistok.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": gpu or device.type,
        "ranks": ranks.world_size(),
        "batch_size": batch_size,
    }
