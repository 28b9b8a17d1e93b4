"""JPEG and WebP at the same number of bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.metrics.image import PSNR


@dataclass(frozen=True)
class Coded:
    """An image that went through a codec.

    Attributes:
        payload: bytes of the compressed picture alone: of a JPEG its scan (its Huffman tables
            are the standard ones), of a WebP its VP8 data behind the frame's header.
        file: bytes of the whole file.
        picture: the decoded image `(C, H, W)` uint8.
    """

    payload: int
    file: int
    picture: Tensor


#: Sides are divided by one of these before coding. At a few dozen bytes a small picture, enlarged
#: again, is far better than a whole one at the lowest quality, which may not even fit.
SHRINKS = (1, 2, 4, 8, 16)


def jpeg(image: Tensor, quality: int, shrink: int = 1) -> Coded:
    """Baseline JPEG, 4:2:0, of an image `(C, H, W)` uint8, C 1 or 3; quality 1 to 95."""
    options = {} if image.shape[0] == 1 else {"subsampling": 2}
    data, picture = _through(image, shrink, format="JPEG", quality=max(1, quality), **options)
    position = 2
    while data[position + 1] != 0xDA:  # segments, up to the start of the scan
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return Coded(len(data) - position - 2, len(data), picture)  # 2: the end marker


def webp(image: Tensor, quality: int, shrink: int = 1) -> Coded:
    """Lossy WebP at its slowest and best method; quality 0 to 100."""
    data, picture = _through(image, shrink, format="WEBP", quality=quality, method=6)
    start = data.index(b"VP8 ")
    size = int.from_bytes(data[start + 4 : start + 8], "little")
    return Coded(size - 10, len(data), picture)  # 10: frame tag, start code, width and height


def _through(image: Tensor, shrink: int, **options: object) -> tuple[bytes, Tensor]:
    array = image.cpu().permute(1, 2, 0).numpy()
    mode = "L" if array.shape[2] == 1 else "RGB"
    picture = Image.fromarray(array[..., 0] if mode == "L" else array)
    size = picture.size
    if shrink > 1:
        small = (math.ceil(size[0] / shrink), math.ceil(size[1] / shrink))
        picture = picture.resize(small, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, **options)  # type: ignore[arg-type]
    decoded = Image.open(buffer).convert(mode)
    if shrink > 1:
        decoded = decoded.resize(size, Image.Resampling.BICUBIC)
    result = torch.from_numpy(np.array(decoded).reshape(array.shape))
    return buffer.getvalue(), result.permute(2, 0, 1)


#: Name to codec and highest quality.
CODECS: dict[str, tuple[Callable[[Tensor, int, int], Coded], int]] = {
    "jpeg": (jpeg, 95),
    "webp": (webp, 100),
}


def best_within(code: Callable[[int], Coded], highest: int, max_bytes: int) -> Coded | None:
    """The result of the highest quality whose payload fits, by bisection; None if none does."""
    best, low, high = None, 0, highest
    while low <= high:
        middle = (low + high) // 2
        result = code(middle)
        if result.payload <= max_bytes:
            best, low = result, middle + 1
        else:
            high = middle - 1
    return best


def codec_curves(images: Tensor, max_bytes: list[int]) -> dict[str, list[dict[str, float]]]:
    """PSNR of each codec at a number of bytes.

    For every image and size in `SHRINKS` the quality is searched so that the payload just fits;
    the size that gives the highest PSNR counts.

    Args:
        images: `(B, C, H, W)` uint8, C 1 or 3.
        max_bytes: limits; one that some image exceeds even at the lowest quality is left out.

    Returns:
        For each codec a list of `max_bytes`, `psnr` (dB, mean of the images), and mean
        `payload_bytes` and `file_bytes`.
    """
    curves = {}
    for name, (codec, highest) in CODECS.items():
        coders = [
            [cache(partial(_coded, codec, image, shrink)) for shrink in SHRINKS] for image in images
        ]
        curves[name] = []
        for limit in max_bytes:
            found = [
                _best_size(image, sizes, highest, limit)
                for image, sizes in zip(images, coders, strict=True)
            ]
            coded = [c for c in found if c is not None]
            if not coded or len(coded) < len(images):
                continue
            pictures = torch.stack([c.picture for c in coded])
            psnr = PSNR().per_image(images.float() / 255, pictures.float() / 255)
            curves[name].append(
                {
                    "max_bytes": limit,
                    "psnr": float(psnr.mean()),
                    "payload_bytes": math.fsum(c.payload for c in coded) / len(coded),
                    "file_bytes": math.fsum(c.file for c in coded) / len(coded),
                }
            )
    return curves


def _coded(
    codec: Callable[[Tensor, int, int], Coded], image: Tensor, shrink: int, quality: int
) -> Coded:
    return codec(image, quality, shrink)


def _best_size(
    image: Tensor, sizes: Sequence[Callable[[int], Coded]], highest: int, max_bytes: int
) -> Coded | None:
    fitting = [c for c in (best_within(s, highest, max_bytes) for s in sizes) if c is not None]
    return min(
        fitting, key=lambda c: float((c.picture.float() - image).square().mean()), default=None
    )
