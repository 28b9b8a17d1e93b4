"""Starts of attention in which a token reads the two halves of its part of the image.

A pyramid of tokens has as many of them as a grid has cells, but the finest level only half as
many: a token that starts with the average of its cells has lost what they differ by. Half of the
heads start by reading one half of the part, the other half of the heads the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_offset(level: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
    """Rows and columns, in cells of `grid`, from the centre of a level's part to that of a half.

    Parts are halved along their longer side.
    """
    rows, columns = (side / part for side, part in zip(grid, level, strict=True))
    return (rows / 4, 0.0) if rows > columns else (0.0, columns / 4)


def side_of(head: int, num_heads: int) -> int:
    """Return the half that a head reads: -1 the first, 1 the second, 0 both if it is alone."""
    return 0 if num_heads == 1 else (-1 if head < num_heads // 2 else 1)


def halves_maps(width: int, mean: float) -> tuple[Tensor, Tensor]:
    """Weights `(W, W)` of values and output with which attention hands on two halves.

    The first W / 2 channels are read. `mean` times the sum of both halves is added to the first
    W / 2 channels, and half of their difference to the last.

    Args:
        width: W, even.
        mean: 0 where the token holds the average already, 0.5 where it holds what an average has
            left.
    """
    eye = torch.eye(width // 2)
    values, output = torch.zeros(width, width), torch.zeros(width, width)
    values[:, : width // 2] = torch.cat([eye, eye])
    output[: width // 2] = mean * torch.cat([eye, eye], dim=1)
    output[width // 2 :] = torch.cat([eye, -eye], dim=1) / 2
    return values, output
