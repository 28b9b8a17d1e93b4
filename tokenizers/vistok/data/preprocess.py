"""Pictures as users have them, cut as the images of an evaluation are."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vistok.core.errors import DataError
from vistok.data.decode import DecodeError, decode
from vistok.data.transforms import Transform

#: Modes of Pillow that PNG keeps as they are; others go through TIFF.
_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def preprocess(images: Any, size: tuple[int, int], channels: int, crop: str) -> Tensor:
    """Return pictures as a tokenizer takes them.

    They go through the code that evaluation uses, so equal files give equal pixels: decoded, turned
    upright, blended over white where transparent, resized with antialiasing and cropped.

    Args:
        images: paths and PIL images, one or a list of them.
        size: height and width of the result.
        channels: 1, 3 or 4.
        crop: a name of `vistok.data.crops.CROPS` that draws no random numbers.

    Returns:
        `(B, C, H, W)` uint8.

    Raises:
        DataError: naming the picture that cannot be used.
    """
    given = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images
    if not isinstance(given, Sequence) and not hasattr(given, "__iter__"):
        raise DataError(
            f"images: expected paths or PIL images, found {type(images).__name__}; arrays and "
            "tensors of the right size go to tokenize as they are"
        )
    transform = Transform(size, crop, key="crop")
    pictures = [_cut(image, number, transform, channels) for number, image in enumerate(given)]
    if not pictures:
        return torch.zeros(0, channels, *size, dtype=torch.uint8)
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def _cut(image: Any, number: int, transform: Transform, channels: int) -> Tensor:
    is_path = isinstance(image, (str, os.PathLike))
    name = os.fspath(image) if is_path else f"image {number}"
    try:
        if is_path:
            with open(os.path.expanduser(name), "rb") as file:
                data = file.read()
        elif isinstance(image, Image.Image):
            data = _as_file(image)
        else:
            raise DataError(f"{name}: expected a path or a PIL image, found {type(image).__name__}")
        array = decode(data, channels)
        # A policy of evaluation draws nothing; the generator is what policies are called with.
        return torch.from_numpy(transform(array, np.random.default_rng(0)))
    except DecodeError as error:
        raise DataError(f"{name}: {error}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def _as_file(image: Image.Image) -> bytes:
    """Return a lossless file of an image that is upright."""
    upright = ImageOps.exif_transpose(image)
    kept = {"transparency": t} if (t := upright.info.get("transparency")) is not None else {}
    file = io.BytesIO()
    if upright.mode in _PNG:
        upright.save(file, "PNG", compress_level=0, exif=b"", **kept)
    else:
        upright.save(file, "TIFF")
    return file.getvalue()
