"""Crop policies by name: the geometry of cutting a picture of a given size out of an image.

A policy takes the image's height and width, those of the result, and the sample's own generator of
random numbers; it never draws from a global one. `vistok.data.transforms.take` cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vistok.data.decode import DecodeError

Size = tuple[int, int]  # height, width


class Cut(NamedTuple):
    """The part taken of an image: a box of it, halved, resized, and of that a window.

    Attributes:
        box: top, left, height and width in the image.
        halvings: how often the box is averaged over 2 x 2 pixels first.
        resized: to this size.
        window: top and left of the result in it.
    """

    box: tuple[int, int, int, int]
    halvings: int
    resized: Size
    window: tuple[int, int]


def tv_center(shape: Size, size: Size, rng: np.random.Generator) -> Cut:
    """Torchvision's Resize (the long side rounded down) and CenterCrop."""
    resized = _covering(shape, size, _tv_long)
    middle = (round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2))
    return Cut((0, 0, *shape), 0, resized, middle)


def adm_center(shape: Size, size: Size, rng: np.random.Generator) -> Cut:
    """ADM's center_crop_arr: box halving, bicubic, sizes rounded, offsets rounded down."""
    halvings, halved = _halvings(shape, size)
    resized = _covering(halved, size, _adm_long)
    middle = ((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2)
    return Cut((0, 0, *shape), halvings, resized, middle)


def resize_random(shape: Size, size: Size, rng: np.random.Generator) -> Cut:
    """Short side to the target, then a random window."""
    resized = _covering(shape, size, _tv_long)
    return Cut((0, 0, *shape), 0, resized, _random_window(resized, size, rng))


def adm_random(shape: Size, size: Size, rng: np.random.Generator) -> Cut:
    """ADM's random_crop_arr: scaled to 1 to 1.25 times the target, then a random window."""
    short = min(size)
    target = int(rng.integers(short, math.ceil(short * 1.25) + 1))
    larger = (round(size[0] * target / short), round(size[1] * target / short))
    halvings, halved = _halvings(shape, larger)
    resized = _covering(halved, larger, _adm_long)
    return Cut((0, 0, *shape), halvings, resized, _random_window(resized, size, rng))


def random_resized(
    shape: Size, size: Size, rng: np.random.Generator, scale: tuple[float, float]
) -> Cut:
    """Torchvision's RandomResizedCrop: a window of random area and shape, to the target.

    For a target that is not square the shape is relative to the target's.
    """
    return Cut(random_box(shape, size, rng, scale), 0, size, (0, 0))


def random(shape: Size, size: Size, rng: np.random.Generator) -> Cut:
    """A random window at the image's own resolution, which must be at least the target's."""
    if shape[0] < size[0] or shape[1] < size[1]:
        raise DecodeError(f"is {text(shape)}, smaller than {text(size)} (crop 'random')")
    return Cut((0, 0, *shape), 0, shape, _random_window(shape, size, rng))


def none(shape: Size, size: Size, rng: np.random.Generator) -> Cut:
    """The image as it is, which must have the target's size."""
    if shape != size:
        raise DecodeError(f"is {text(shape)}, not {text(size)} (crop 'none')")
    return Cut((0, 0, *shape), 0, shape, (0, 0))


CROPS: dict[str, Callable[..., Cut]] = {
    f.__name__: f
    for f in (tv_center, adm_center, resize_random, adm_random, random_resized, random, none)
}


def random_box(
    shape: Size, size: Size, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width; equal draws give the same part at any scale."""
    draws = rng.random((10, 4))
    for area, ratio, down, right in draws:
        wanted = shape[0] * shape[1] * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3)) * size[1] / size[0]
        height, width = round(math.sqrt(wanted / aspect)), round(math.sqrt(wanted * aspect))
        if 0 < height <= shape[0] and 0 < width <= shape[1]:
            top, left = int(down * (shape[0] - height + 1)), int(right * (shape[1] - width + 1))
            return top, left, height, width
    # The image is far longer than any window: the largest that fits, in the middle.
    height = min(shape[0], round(shape[1] * size[0] / size[1] * 4 / 3))
    width = min(shape[1], round(shape[0] * size[1] / size[0] * 4 / 3))
    return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width


def text(shape: Sequence[int]) -> str:
    """Return a size for messages: height x width."""
    return f"{shape[0]}x{shape[1]}"


def _covering(shape: Size, size: Size, long_side: Callable[[int, int, int], int]) -> Size:
    """Return the smallest size of the image's own shape that covers `size`."""
    (height, width), (h, w) = shape, size
    if height * w <= width * h:
        return h, max(w, long_side(width, h, height))
    return max(h, long_side(height, w, width)), w


# The long side when the short one goes to `target`; the formulas of the originals, to the bit.
def _tv_long(long: int, target: int, short: int) -> int:
    return int(target * long / short)


def _adm_long(long: int, target: int, short: int) -> int:
    return round(long * (target / short))


def _halvings(shape: Size, size: Size) -> tuple[int, Size]:
    """ADM's first step: halving while twice the target still fits; how often, and what is left."""
    halvings = 0
    while shape[0] >= 2 * size[0] and shape[1] >= 2 * size[1]:
        halvings, shape = halvings + 1, (shape[0] // 2, shape[1] // 2)
    return halvings, shape


def _random_window(shape: Size, size: Size, rng: np.random.Generator) -> tuple[int, int]:
    top = int(rng.integers(shape[0] - size[0] + 1))
    return top, int(rng.integers(shape[1] - size[1] + 1))
