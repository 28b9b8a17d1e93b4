"""Positions of patches and latent tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError

#: How positions are read between the places that they were learned at.
Interpolation = Literal["bicubic", "bilinear"]


def sincos_positions(points: Tensor, width: int, grid: tuple[int, int]) -> Tensor:
    """Sine-cosine features of 2D points; wavelengths from 2 patches to twice the grid.

    Args:
        points: `(N, 2)` coordinates in units of patches.
        width: number of features, a multiple of 4.
        grid: rows and columns of patches.

    Returns:
        `(N, width)` float32 in [-1, 1]; half of it for each coordinate.
    """
    if width % 4:
        raise ArgumentError(
            f"width: sine-cosine positions take {width} of its channels, must be a multiple of 4"
        )
    angles = points.float()[:, :, None] * _frequencies(width, grid)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _frequencies(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the `width / 4` frequencies of each coordinate, in radians per patch."""
    steps = torch.arange(width // 4) / max(1, width // 4 - 1)
    return math.pi * max(2.0, float(max(grid))) ** -steps


def shift_matrix(offset: Sequence[float], width: int, grid: tuple[int, int]) -> Tensor:
    """Matrix `(width, width)` from `sincos_positions` of a point to those of point + offset.

    Args:
        offset: rows and columns, in units of patches.
        width: number of features.
        grid: as for the positions.
    """
    blocks = []
    for along in offset:
        angles = along * _frequencies(width, grid)
        cos, sin = angles.cos().diag(), angles.sin().diag()
        blocks.append(torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)]))
    return torch.block_diag(*blocks)


def position_table(points: Tensor, width: int, num_dims: int, grid: tuple[int, int]) -> Tensor:
    """Positions for a stream of `width`: sines and cosines in the last `num_dims`, else zero."""
    table = torch.zeros(len(points), width)
    table[:, width - num_dims :] = 2 * sincos_positions(points, num_dims, grid)
    return table


def grid_points(grid: tuple[int, int]) -> Tensor:
    """Coordinates `(rows * columns, 2)` of the patches, raster order."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], dim=1).float()


def spread_points(count: int, grid: tuple[int, int], nested: bool = False) -> Tensor:
    """`count` points spread evenly over a patch grid, `(count, 2)`.

    With as many points as patches they are the patches. Latent tokens that start at these
    positions look at all of the image from the first step.

    Args:
        count: number of points.
        grid: rows and columns of patches.
        nested: not row after row, but so that the first k are spread over the grid for every k:
            each next point is the one farthest from those before it. For tokens whose tail is
            dropped: row after row, a prefix would begin with the top of the image.
    """
    rows, columns = grid
    num_rows = min(count, max(1, round(math.sqrt(count * rows / columns))))
    points: list[tuple[float, float]] = []
    for row in range(num_rows):
        # Rows share the points as evenly as integers allow.
        in_row = (row + 1) * count // num_rows - row * count // num_rows
        y = (row + 0.5) / num_rows * rows - 0.5
        points += [(y, (column + 0.5) / in_row * columns - 0.5) for column in range(in_row)]
    return torch.tensor(_farthest_first(points) if nested else points)


def _farthest_first(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    # In plain Python: on the meta device a tensor has no values.
    centre = tuple(sum(axis) / len(points) for axis in zip(*points, strict=True))
    order = [min(points, key=lambda point: math.dist(point, centre))]
    nearest = [math.dist(point, order[0]) for point in points]
    while len(order) < len(points):
        order.append(points[max(range(len(points)), key=nearest.__getitem__)])
        nearest = [min(d, math.dist(p, order[-1])) for d, p in zip(nearest, points, strict=True)]
    return order


def level_points(grids: Sequence[tuple[int, int]], finest: tuple[int, int]) -> Tensor:
    """Centres `(L, 2)` of the cells of each grid, in units of the finest grid's cells."""
    points = []
    for grid in grids:
        scale = torch.tensor([side / part for side, part in zip(finest, grid, strict=True)])
        points.append((grid_points(grid) + 0.5) * scale - 0.5)
    return torch.cat(points)


def resize_positions(
    positions: Tensor,
    before: tuple[int, int],
    after: tuple[int, int],
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Return learned positions of a grid for another grid of the same area.

    Args:
        positions: `(rows * columns, D)` in raster order.
        before: rows and columns that they were learned for.
        after: rows and columns of the result.
        interpolation: "bicubic" or "bilinear", both antialiased.

    Returns:
        `(rows * columns, D)` of the new grid, in the same precision.
    """
    grid = positions.float().T.reshape(1, -1, *before)
    grid = F.interpolate(grid, after, mode=interpolation, align_corners=False, antialias=True)
    return grid.flatten(2)[0].T.to(positions.dtype)
