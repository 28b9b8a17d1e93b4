"""Levels of tokens, coarse to fine: residual pooling, merging, block-causal masks (ResTok)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.nn.positions import grid_points

Grid = tuple[int, int]


def residual_pyramid(grid: Tensor, levels: Sequence[Grid]) -> list[Tensor]:
    """Averages over the cells of each level, of what the levels before have not said.

    Args:
        grid: `(B, W, rows, columns)`.
        levels: grids, coarse to fine.

    Returns:
        `(B, cells, W)` for each level, raster order.
    """
    tokens = []
    for level in levels:
        pooled = F.adaptive_avg_pool2d(grid, level)
        tokens.append(pooled.flatten(2).transpose(1, 2))
        grid = grid - F.interpolate(pooled, size=grid.shape[2:], mode="nearest")
    return tokens


def halved(grid: Grid, axis: str = "columns") -> Grid:
    """Return the grid with half as many cells along an axis.

    Args:
        grid: rows and columns.
        axis: "columns": 16x16, 16x8, 16x4, 16x2, ...; "longest", of a square the rows: 16x16,
            8x16, 8x8, 4x8, ...

    Raises:
        ConfigError: if there is one cell along it only, or their number is odd.
    """
    rows, columns = grid
    along_columns = axis == "columns" or rows < columns
    side = columns if along_columns else rows
    if side == 1 or side % 2:
        raise ArgumentError(
            f"merge_layers: a grid of {rows} x {columns} cells can't be halved; "
            "merge in fewer layers, or take images of 2, 4, 8, 16, ... cells a side"
        )
    return (rows, columns // 2) if along_columns else (rows // 2, columns)


def merge_residual(tokens: Tensor, grid: Grid, axis: str = "columns") -> tuple[Tensor, Tensor]:
    """Every other token of a grid, and what is left of all of them without it.

    Args:
        tokens: `(B, cells, W)`, raster order.
        grid: its rows and columns.
        axis: see `halved`.

    Returns:
        coarse `(B, cells / 2, W)` of the halved grid, and tokens minus its nearest upsampling:
        zero at the tokens that were taken.
    """
    dim = 1 if halved(grid, axis)[0] < grid[0] else 2
    cells = tokens.unflatten(1, grid)
    coarse = cells[:, ::2] if dim == 1 else cells[:, :, ::2]
    rest = cells - coarse.repeat_interleave(2, dim=dim)
    return coarse.flatten(1, 2), rest.flatten(1, 2)


def block_causal_mask(counts: Sequence[int]) -> Tensor:
    """`(L, L)` bool, True = visible: a token sees its own level whole, and all earlier levels."""
    level = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    return level[:, None] >= level


#: Where the rotary positions of tokens lie: parts of a sequence one behind the other, as in the
#: released code, or each token at the centre of its part of the image.
Places = Literal["queued", "centered"]


def queued_points(parts: Sequence[Grid | int]) -> Tensor:
    """Places `(L, 2)` of parts that lie one behind the other, as in ResTok's released code.

    Args:
        parts: grids, in rows and columns of their own cells, and numbers of tokens, which lie on
            the diagonal; each behind as many places as there are tokens before it.
    """
    points, start = [], 0
    for part in parts:
        single = isinstance(part, int)
        places = torch.arange(part).float()[:, None].expand(-1, 2) if single else grid_points(part)
        points.append(places + start)
        start += len(places)
    return torch.cat(points)


class LevelLinear(nn.Module):
    """A linear layer of its own for each level of a sequence.

    Args:
        counts: tokens of each level.
        in_features: width of the input.
        out_features: width of the output.
    """

    def __init__(self, counts: Sequence[int], in_features: int, out_features: int) -> None:
        super().__init__()
        self.counts = list(counts)
        self.out_features = out_features
        self.layers = nn.ModuleList(nn.Linear(in_features, out_features) for _ in counts)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, sum of counts, in_features)` to `(B, sum of counts, out_features)`."""
        parts = x.split(self.counts, dim=1)
        return torch.cat([net(part) for net, part in zip(self.layers, parts, strict=True)], dim=1)
