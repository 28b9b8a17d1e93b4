"""Patches of an image: cutting, joining, positions, and an initialisation from data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.errors import ArgumentError, ConfigError


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of a size that may be given as the side of a square."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def grid_of(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of (H, W) pixels.

    Raises:
        ConfigError: if a side is not a multiple of the patch.
    """
    height, width = as_pair(image_size)
    if height % patch_size or width % patch_size:
        fits = [max(patch_size, round(side / patch_size) * patch_size) for side in (height, width)]
        size = fits[0] if height == width else fits
        raise ConfigError(
            f"data.image_size={height if height == width else [height, width]} is not divisible "
            f"by the patch of {patch_size} px; use data.image_size={size} or another patch size"
        )
    return height // patch_size, width // patch_size


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
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, rows * p, columns * p)


def pad_edges(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` with each edge repeated once: `(B, C, H+2, W+2)`.

    As replicate padding, whose gradient in torch 2.15 does not compile.
    """
    images = torch.cat([images[:, :, :1], images, images[:, :, -1:]], dim=2)
    return torch.cat([images[..., :1], images, images[..., -1:]], dim=3)


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
    steps = torch.arange(width // 4) / max(1, width // 4 - 1)
    frequencies = math.pi * max(2.0, float(max(grid))) ** -steps
    angles = points.float()[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


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


@torch.no_grad()
def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal component analysis.

    Args:
        rows: `(M, F)` samples.
        count: number of components, at most F.

    Returns:
        mean `(F,)`, components `(count, F)` with orthonormal rows, strongest first, and their
        standard deviations `(count,)`; float32.
    """
    x = rows.double()
    mean = x.mean(dim=0)
    covariance = (x - mean).T @ (x - mean) / max(1, len(x) - 1)
    variances, vectors = torch.linalg.eigh(covariance)
    order = torch.arange(x.shape[1] - 1, x.shape[1] - 1 - count, -1)
    deviations = variances[order].clamp(min=0).sqrt()
    return mean.float(), vectors[:, order].T.contiguous().float(), deviations.float()


@torch.no_grad()
def start_at_components_(
    layer: nn.Linear, rows: Tensor, num_dims: int, deviation: Tensor | None = None
) -> None:
    """Let a linear layer start at the principal components of what it will see, mean taken off.

    All on one scale. So what differs between images is as large as anything else from the first
    step, and not a ripple on a constant that training moves about.

    Args:
        layer: its first `num_dims` outputs, or as many as it has inputs, are set; others are 0.
        rows: `(M, in_features)` samples.
        num_dims: at most `out_features`.
        deviation: what becomes 1; None for the components' own, root mean square.
    """
    count = min(num_dims, rows.shape[1])
    mean, components, deviations = principal_components(rows, count)
    if deviation is None:
        deviation = deviations.square().mean().sqrt()
    components = components / deviation.clamp(min=1e-6)
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[:count] = components
    layer.bias[:count] = -components @ mean


@torch.no_grad()
def least_squares(inputs: Tensor, outputs: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The linear layer that maps `inputs` to `outputs` best.

    Args:
        inputs: `(M, I)`.
        outputs: `(M, O)`.
        ridge: penalty on the weights, relative to the mean variance of the inputs.

    Returns:
        weight `(O, I)` and bias `(O,)`, float32.
    """
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.float(), (y_mean - weight @ x_mean).float()
