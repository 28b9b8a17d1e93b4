"""Patches of an image: cutting and joining."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut `(B, C, H, W)` into `(B, N, P*P*C)`, raster order; inside a patch (row, column, C)."""
    batch, channels, height, width = images.shape
    p = patch_size
    x = images.view(batch, channels, height // p, p, width // p, p)
    count = (height // p) * (width // p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, count, p * p * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: `(B, N, P*P*C)` to `(B, C, H, W)`."""
    rows, columns = grid
    p = patch_size
    channels = patches.shape[2] // (p * p)
    x = patches.view(patches.shape[0], rows, columns, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], channels, rows * p, columns * p)


def pad_edges(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` with each edge repeated once: `(B, C, H+2, W+2)`.

    As replicate padding, whose gradient in torch 2.15 does not compile.
    """
    images = torch.cat([images[:, :, :1], images, images[:, :, -1:]], dim=2)
    return torch.cat([images[..., :1], images, images[..., -1:]], dim=3)
