"""Sizes of images and the grids of their patches."""

from __future__ import annotations

from collections.abc import Sequence

from vistok.core.errors import ConfigError

#: Places along each axis: (rows, columns), or (frames, rows, columns).
Grid = tuple[int, ...]


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


def cell_side(image_size: tuple[int, int], grid: Grid | None, key: str) -> int:
    """Return the side in pixels of the square cells that a grid cuts images into.

    Args:
        image_size: (H, W) in pixels.
        grid: of a tokenizer's tokens.
        key: where the tokenizer comes from, for errors; for example "stage.proxy=runs/vqgan".

    Raises:
        ConfigError: if the tokens are not in rows and columns, or the cells are not squares.
    """
    if grid is None or len(grid) != 2:
        raise ConfigError(f"{key}: must be a 2D tokenizer; its tokens are not in rows and columns")
    (height, width), (rows, columns) = image_size, grid
    side = height // rows
    if (rows * side, columns * side) != (height, width):
        raise ConfigError(
            f"{key}: must have square cells, found {rows} x {columns} of them in images of "
            f"{height} x {width} pixels"
        )
    return side
