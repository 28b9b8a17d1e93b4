"""A baseline that spends the same bits without learning: k-means over patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.geometry import grid_of
from vistok.metrics.image import PSNR, to_uint8
from vistok.models.tokenizer import Tokenizer
from vistok.nn.patches import patchify, unpatchify
from vistok.quantizers.kmeans import kmeans


def baseline_options(config: dict[str, Any] | None) -> dict[str, int]:
    """Return the arguments of `kmeans_baseline`; none if a run measures no baseline.

    Args:
        config: the group `baseline` of a run; none without it or without a `patch_size`.

    Raises:
        ConfigError: if a value is not a whole number of at least 1.
    """
    if not config or config.get("patch_size") is None:
        return {}
    options = {}
    for key in ("patch_size", "num_patches", "iterations"):
        value = config.get(key)
        if type(value) is not int or value < 1:
            found = "null" if value is None else value
            none = "; baseline=null for none" if key == "patch_size" else ""
            raise ConfigError(
                f"baseline.{key}={found}: expected a whole number of at least 1{none}"
            )
        options[key] = value
    return options


def kmeans_baseline(
    data: Any, tokenizer: Tokenizer, patch_size: int, num_patches: int, iterations: int
) -> dict[str, Any]:
    """Return the PSNR of a k-means codebook over patches that spends the tokenizer's bits.

    It is trained on patches of the training images and measured on all validation images. Every
    rank must call it.

    Args:
        data: a DataModule that is set up.
        tokenizer: its bits per image are spent; if they do not come to 2 to 4096 codes per
            patch, nothing is computed.
        patch_size: side of a patch in pixels.
        num_patches: patches to train on.
        iterations: of Lloyd's algorithm.

    Returns:
        `baseline_kmeans_psnr` (dB) and `baseline_kmeans_codes`, or nothing.
    """
    bits, device = tokenizer.bits_per_image, tokenizer.device
    codebook = patch_codebook(data, bits, patch_size, num_patches, iterations, device)
    if codebook is None:
        return {}
    psnr = PSNR().to(device)
    for batch in data.val_dataloader():
        originals = batch["image"][batch["valid"]].to(device)
        psnr.update(originals, quantize_patches(originals, codebook, patch_size))
    return {"baseline_kmeans_psnr": psnr.compute().item(), "baseline_kmeans_codes": len(codebook)}


def patch_codebook(
    data: Any,
    bits: float,
    patch_size: int,
    num_patches: int,
    iterations: int,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Return a k-means codebook `(K, patch)` over patches of training images, in [0, 1].

    It is the same however a run was trained, and on every rank; all of them must call it.

    Args:
        data: a DataModule that is set up.
        bits: of an image, which decide K.
        patch_size: side of a patch in pixels.
        num_patches: patches to train on.
        iterations: of Lloyd's algorithm.
        device: where it is computed and returned.

    Returns:
        None if patches do not tile the images, or their codes are not 2 to 4096.
    """
    height, width = data.image_size
    if height % patch_size or width % patch_size:
        return None
    grid = grid_of((height, width), patch_size)
    exponent = bits / (grid[0] * grid[1])
    num_codes = round(2**exponent) if exponent < 16 else 0
    if not 2 <= num_codes <= 4096:
        return None
    num_images = min(data.num_train, -(-num_patches // (grid[0] * grid[1])))
    images = data.init_batches(num_images).to(device)
    patches = patchify(images.float() / 255, patch_size).flatten(0, 1)[:num_patches]
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices):  # the same codes however the run was trained
        torch.manual_seed(0)
        return kmeans(patches, num_codes, iterations)[0]


def quantize_patches(images: Tensor, codebook: Tensor, patch_size: int) -> Tensor:
    """Images `(B, C, H, W)` uint8 with every patch replaced by its nearest code."""
    patches = patchify(images.float() / 255, patch_size)
    scores = patches @ codebook.T - codebook.square().sum(dim=1) / 2
    grid = grid_of((images.shape[2], images.shape[3]), patch_size)
    return to_uint8(unpatchify(codebook[scores.argmax(dim=-1)], grid, patch_size))
