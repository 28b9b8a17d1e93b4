"""Patches of an image: cutting and joining."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def fold(images: Tensor, side: int) -> Tensor:
    """Squares of `side` pixels of `(B, C, H, W)` as channels: `(B, C * side ** 2, ...)`."""
    if images.shape[0] > 0:
        return F.pixel_unshuffle(images, side) if side > 1 else images
    _, channels, height, width = images.shape  # which torch 2.15 leaves as they are
    return images.new_empty(0, channels * side * side, height // side, width // side)


def haar(images: Tensor, side: int) -> Tensor:
    """Return Haar wavelets of `(B, C, H, W)`: `(B, C * side ** 2, H / side, W / side)`.

    Of four pixels each level takes the mean, and half the mean differences of rows, of columns and
    of diagonals, of the bands of the level before as well (Cosmos, https://arxiv.org/abs/2501.03575).
    The first C channels are means over squares of `side` pixels.

    Args:
        images: their sides multiples of `side`.
        side: a power of 2.
    """
    while side > 1:
        even, odd = images[..., 0::2, :], images[..., 1::2, :]
        low, high = (even + odd) / 4, (even - odd) / 4
        bands = [
            band[..., 0::2] + sign * band[..., 1::2] for sign in (1, -1) for band in (low, high)
        ]
        images, side = torch.cat(bands, dim=1), side // 2
    return images


def unfold_haar(bands: Tensor, side: int) -> Tensor:
    """Inverse of `haar`: `(B, C * side ** 2, H / side, W / side)` to `(B, C, H, W)`."""
    while side > 1:
        means, rows, columns, diagonals = bands.chunk(4, dim=1)
        low = torch.stack([means + columns, means - columns], dim=-1).flatten(-2)
        high = torch.stack([rows + diagonals, rows - diagonals], dim=-1).flatten(-2)
        bands = torch.stack([low + high, low - high], dim=-2).flatten(-3, -2)
        side //= 2
    return bands
