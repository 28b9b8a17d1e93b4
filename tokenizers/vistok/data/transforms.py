"""Crops and augmentations, by name: `(H, W, C)` uint8 in, `(h, w, C)` uint8 out.

A policy never draws from a global generator; it is handed the sample's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from vistok.data.decode import DecodeError, Reduction
from vistok.errors import ConfigError, nearest

Size = tuple[int, int]  # height, width


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Bicubic and antialiased; within 2 of 255 levels of Pillow's, at half its cost."""
    if image.shape[:2] == size:
        return image
    # Channels last, in the strides of the batch's axis too: torch's fast path.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _covering(image: np.ndarray, size: Size, long_side: Callable[[int, int, int], int]) -> Size:
    """The smallest size of the image's own shape that covers `size`."""
    (height, width), (h, w) = image.shape[:2], size
    if height * w <= width * h:
        return h, max(w, long_side(width, h, height))
    return max(h, long_side(height, w, width)), w


# The long side when the short one goes to `target`; the formulas of the originals, to the bit.
def _tv_long(long: int, target: int, short: int) -> int:
    return int(target * long / short)


def _adm_long(long: int, target: int, short: int) -> int:
    return round(long * (target / short))


def _halved(image: np.ndarray, size: Size) -> np.ndarray:
    """ADM's first step: box-filtered halving while twice the target still fits."""
    while image.shape[0] >= 2 * size[0] and image.shape[1] >= 2 * size[1]:
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        half = (picture.width // 2, picture.height // 2)
        halved = np.array(picture.resize(half, Image.Resampling.BOX))
        image = halved.reshape(*halved.shape[:2], image.shape[2])
    return image


def _window(image: np.ndarray, size: Size, top: int, left: int) -> np.ndarray:
    return image[top : top + size[0], left : left + size[1]]


def _random_window(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    top = int(rng.integers(image.shape[0] - size[0] + 1))
    left = int(rng.integers(image.shape[1] - size[1] + 1))
    return _window(image, size, top, left)


def tv_center(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """Torchvision's Resize (the long side rounded down) and CenterCrop."""
    image = resize(image, _covering(image, size, _tv_long))
    top = round((image.shape[0] - size[0]) / 2)
    left = round((image.shape[1] - size[1]) / 2)
    return _window(image, size, top, left)


def adm_center(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """ADM's center_crop_arr: box halving, bicubic, sizes rounded, offsets rounded down."""
    image = _halved(image, size)
    image = resize(image, _covering(image, size, _adm_long))
    return _window(image, size, (image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2)


def resize_random(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """Short side to the target, then a random window."""
    return _random_window(resize(image, _covering(image, size, _tv_long)), size, rng)


def adm_random(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """ADM's random_crop_arr: scaled to 1 to 1.25 times the target, then a random window."""
    short = min(size)
    target = int(rng.integers(short, math.ceil(short * 1.25) + 1))
    larger = (round(size[0] * target / short), round(size[1] * target / short))
    image = _halved(image, larger)
    return _random_window(resize(image, _covering(image, larger, _adm_long)), size, rng)


def random_resized(
    image: np.ndarray, size: Size, rng: np.random.Generator, scale: tuple[float, float]
) -> np.ndarray:
    """Torchvision's RandomResizedCrop: a window of random area and shape, to the target.

    For a target that is not square the shape is relative to the target's.
    """
    top, left, height, width = _random_box((image.shape[0], image.shape[1]), size, rng, scale)
    return resize(_window(image, (height, width), top, left), size)


def _random_box(
    shape: Size, size: Size, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width. Equal draws give the same part of an image at any scale."""
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


def random(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """A random window at the image's own resolution, which must be at least the target's."""
    if image.shape[0] < size[0] or image.shape[1] < size[1]:
        raise DecodeError(f"is {_text(image.shape)}, smaller than {_text(size)} (crop 'random')")
    return _random_window(image, size, rng)


def none(image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
    """The image as it is, which must have the target's size."""
    if image.shape[:2] != size:
        raise DecodeError(f"is {_text(image.shape)}, not {_text(size)} (crop 'none')")
    return image


def _text(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def hflip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored left to right, half of the time."""
    if rng.random() >= 0.5:
        return image
    # A fifth of what copying a view with a negative stride would cost.
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return pixels.flip(3)[0].permute(1, 2, 0).numpy()


def vflip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored top to bottom, half of the time."""
    return image[::-1] if rng.random() < 0.5 else image


def rot90(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned by 0, 90, 180 or 270 degrees."""
    return np.rot90(image, int(rng.integers(4)))


def color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour channels permuted, contrast times 0.7 to 1.4, brightness up to 38 levels off.

    Contrast and brightness are limited so that no pixel leaves the range: clipped areas would
    teach the tokenizer flat patches that photographs do not have. Alpha stays.
    """
    colours = min(image.shape[2], 3)
    picture = image[:, :, rng.permutation(colours)]
    low, high, mean = float(picture.min()), float(picture.max()), float(picture.mean())
    gain = min(np.exp(rng.uniform(np.log(0.7), np.log(1.4))), 255 / max(high - low, 1))
    offset = mean * (1 - gain) + rng.uniform(-38, 38)
    offset = np.clip(offset, -gain * low, 255 - gain * high)
    table = np.clip(np.rint(np.arange(256) * gain + offset), 0, 255).astype(np.uint8)
    return np.concatenate([table[picture], image[:, :, colours:]], axis=2)


CROPS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f
    for f in (tv_center, adm_center, resize_random, adm_random, random_resized, random, none)
}
# How much larger than needed an image must come out of a scaled decode, for the resize that
# follows to hide how it was made.
MARGIN = 1.5
AUGMENTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    f.__name__: f for f in (hflip, vflip, rot90, color)
}


class Transform:
    """One crop policy and any augmentations after it.

    Args:
        size: height and width of the result.
        crop: a name of `CROPS`.
        augment: names of `AUGMENTS`, applied in this order.
        key: the configuration key of the crop, for messages.
        scale: least and largest share of the area that `random_resized` takes.

    Raises:
        ConfigError: for an unknown name, or `rot90` with a size that is not square.
    """

    def __init__(
        self,
        size: Size,
        crop: str,
        augment: Sequence[str] = (),
        key: str = "data.train_crop",
        scale: tuple[float, float] = (0.08, 1.0),
    ):
        if crop not in CROPS:
            raise ConfigError(
                f"{key}={crop!r} is no crop policy{nearest(str(crop), CROPS)};"
                f" there are {', '.join(CROPS)}"
            )
        unknown = (
            [augment] if isinstance(augment, str) else [a for a in augment if a not in AUGMENTS]
        )
        if unknown:
            wrong = unknown[0]
            raise ConfigError(
                f"data.augment holds {wrong!r}{nearest(str(wrong), AUGMENTS)}; write a list of"
                f" {', '.join(AUGMENTS)}, for example data.augment=[hflip]"
            )
        if "rot90" in augment and size[0] != size[1]:
            raise ConfigError(
                f"data.augment=rot90 needs a square data.image_size, not {_text(size)}"
            )
        self.size, self.crop, self.augment = size, crop, tuple(augment)
        self.scale = scale

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop and augment `(H, W, C)` uint8; the result is contiguous.

        Raises:
            DecodeError: if the policy cannot take an image of this size.
        """
        return np.ascontiguousarray(self.apply(image, rng))

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """As `__call__`, but a view of whatever layout."""
        more = (self.scale,) if self.crop == "random_resized" else ()
        image = CROPS[self.crop](image, self.size, rng, *more)
        for name in self.augment:
            image = AUGMENTS[name](image, rng)
        return image

    def reduction(self, rng: Callable[[], np.random.Generator]) -> Reduction:
        """How many times smaller an image may be decoded for a result that hardly differs.

        Args:
            rng: gives a generator in the state of that which `__call__` will get.
        """

        def factor(height: int, width: int) -> int:
            (h, w), taken = self.size, (height, width)
            if self.crop in ("random", "none"):
                return 1
            if self.crop == "random_resized":
                taken = _random_box(taken, self.size, rng(), self.scale)[2:]
            larger = MARGIN * (1.25 if self.crop == "adm_random" else 1)
            spare = min(taken[0] / h, taken[1] / w) / larger
            return next((f for f in (8, 4, 2) if spare >= f), 1)

        return factor
