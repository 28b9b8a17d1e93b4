"""Turn an image into one of the batch's size: uint8 `(H, W, C)` in, `(h, w, C)` out.

Random numbers are the sample's own; nothing here draws from a global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vistok.core.errors import ConfigError, nearest
from vistok.core.torch_internals import resize_bicubic_into
from vistok.data.crops import CROPS, Cut, Size, random_box, text
from vistok.data.decode import MAX_PIXELS, DecodeError, Reduction

# How much larger than needed an image must come out of a scaled decode, for the resize that
# follows to hide how it was made.
MARGIN = 1.5


def take(
    image: np.ndarray, cut: Cut, size: Size, mirrored: bool = False, out: Tensor | None = None
) -> np.ndarray | None:
    """Cut a picture out of an image; bicubic and antialiased.

    Resized pixels are within 2 of 255 levels of Pillow's, at half its cost. Lines are resized
    first, then columns, as `F.interpolate` does it; between the two only the window's columns are
    kept, and mirrored, and the last step writes to the batch.

    Args:
        image: `(H, W, C)` uint8.
        cut: where.
        size: height and width of the result.
        mirrored: left to right, at last.
        out: `(h, w, C)` uint8, contiguous: where the result goes.

    Returns:
        `(h, w, C)` uint8 of whatever layout, perhaps a view of the image; None if it is in `out`.
    """
    top, left, height, width = cut.box
    image = image[top : top + height, left : left + width]
    for _ in range(cut.halvings):
        image = _halved(image)
    pixels, (tall, wide), (top, left) = _pixels(torch.from_numpy(image)), cut.resized, cut.window
    if pixels.shape[3] != wide:
        pixels = _bicubic(pixels.contiguous(memory_format=_LAST), (pixels.shape[2], wide))
    if wide != size[1]:
        pixels = pixels[..., left : left + size[1]]
    if mirrored:
        pixels = _mirrored(pixels)
    if pixels.shape[2] != tall:
        pixels = pixels.contiguous(memory_format=_LAST)
        if out is not None and tall == size[0]:
            resize_bicubic_into(pixels, _pixels(out))
            return None
        pixels = _bicubic(pixels, (tall, size[1]))
    if tall != size[0]:
        pixels = pixels[..., top : top + size[0], :]
    if out is None:
        return _array(pixels)
    _pixels(out).copy_(pixels)
    return None


_LAST = torch.channels_last  # torch's fast path for resizing and mirroring


def _pixels(image: Tensor) -> Tensor:
    return image[None].permute(0, 3, 1, 2)


def _array(pixels: Tensor) -> np.ndarray:
    return pixels[0].permute(1, 2, 0).numpy()


def _bicubic(pixels: Tensor, size: Size) -> Tensor:
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)


def _mirrored(pixels: Tensor) -> Tensor:
    # A fifth of what copying a view with a negative stride would cost.
    return pixels.contiguous(memory_format=_LAST).flip(3)


def _halved(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    half = (picture.width // 2, picture.height // 2)
    halved = np.array(picture.resize(half, Image.Resampling.BOX))
    return halved.reshape(*halved.shape[:2], image.shape[2])


def hflip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left to right, half of the time."""
    if rng.random() >= 0.5:
        return image
    return _array(_mirrored(_pixels(torch.from_numpy(np.ascontiguousarray(image)))))


def vflip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror top to bottom, half of the time."""
    return image[::-1] if rng.random() < 0.5 else image


def rot90(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn by 0, 90, 180 or 270 degrees."""
    return np.rot90(image, int(rng.integers(4)))


def color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Permute color channels, with contrast times 0.7 to 1.4, brightness up to 38 levels off.

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
                f"{key}={crop!r}: must be one of {', '.join(CROPS)}{nearest(str(crop), CROPS)}"
            )
        if isinstance(augment, str):
            raise ConfigError(
                f"data.augment={augment}: must be a list of {', '.join(AUGMENTS)}, for example"
                " data.augment=[hflip]"
            )
        if unknown := [name for name in augment if name not in AUGMENTS]:
            raise ConfigError(
                f"data.augment: {unknown[0]!r} is not one of {', '.join(AUGMENTS)}"
                f"{nearest(str(unknown[0]), AUGMENTS)}"
            )
        if "rot90" in augment and size[0] != size[1]:
            others = ",".join(name for name in augment if name != "rot90")
            raise ConfigError(
                f"data.augment=rot90 needs a square data.image_size, not {text(size)}; without it: "
                f"data.augment=[{others}]"
            )
        self.size, self.crop, self.augment = size, crop, tuple(augment)
        self.scale = scale

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop and augment `(H, W, C)` uint8; the result is contiguous.

        Raises:
            DecodeError: if the policy cannot take an image of this size.
        """
        out = torch.empty(*self.size, image.shape[2], dtype=torch.uint8)
        self.write(image, rng, out)
        return out.numpy()

    def write(
        self,
        image: np.ndarray,
        rng: np.random.Generator,
        out: Tensor,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Do as `__call__`, and write to `out` `(h, w, C)` uint8, contiguous.

        Raises:
            DecodeError: as `__call__`; or if the image is so long and thin that it would have more
                than `max_pixels` on the way to the crop.
        """
        more = (self.scale,) if self.crop == "random_resized" else ()
        cut = CROPS[self.crop]((image.shape[0], image.shape[1]), self.size, rng, *more)
        height, (tall, wide) = cut.box[2] >> cut.halvings, cut.resized
        if max(height * wide, tall * self.size[1]) > max_pixels:
            shape, most = f"{image.shape[0]} x {image.shape[1]}", f"data.max_pixels={max_pixels}"
            reason = f"{shape} pixels become {tall} x {wide} for the crop, above {most}"
            raise DecodeError(reason, "too large")
        augment, mirrored = self.augment, False
        if augment[:1] == ("hflip",):  # half way through the resize it is cheaper
            augment, mirrored = augment[1:], rng.random() < 0.5
        picture = take(image, cut, self.size, mirrored, None if augment else out)
        if picture is not None:
            for name in augment:
                picture = AUGMENTS[name](picture, rng)
            np.copyto(out.numpy(), picture)

    def reduction(self, rng: Callable[[], np.random.Generator]) -> Reduction:
        """Return how many times smaller an image may be decoded for nearly the same result.

        Args:
            rng: gives a generator in the state of that which `__call__` will get.
        """

        def factor(height: int, width: int) -> int:
            (h, w), taken = self.size, (height, width)
            if self.crop in ("random", "none"):
                return 1
            if self.crop == "random_resized":
                taken = random_box(taken, self.size, rng(), self.scale)[2:]
            larger = MARGIN * (1.25 if self.crop == "adm_random" else 1)
            spare = min(taken[0] / h, taken[1] / w) / larger
            return next((f for f in (8, 4, 2) if spare >= f), 1)

        return factor
