"""JPEG, WebP, AVIF and JPEG XL at the same number of bytes."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from vistok.core.errors import ConfigError, nearest
from vistok.metrics.image import PSNR


@dataclass(frozen=True)
class Coded:
    """An image that went through a codec.

    Attributes:
        payload: bytes of the compressed picture alone, without headers: of a JPEG its scan (its
            Huffman tables are the standard ones), of a WebP its VP8 data behind the frame's
            header, of an AVIF its AV1 data, of a JPEG XL the codestream behind its signature.
        file: bytes of the whole file.
        picture: the decoded image `(C, H, W)` uint8.
    """

    payload: int
    file: int
    picture: Tensor


#: Sides are divided by one of these before coding. At a few dozen bytes a small picture, enlarged
#: again, is far better than a whole one at the lowest quality, which may not even fit.
SHRINKS = (1, 2, 4, 8, 16)

#: What counts as the bytes of a coded image, in words.
COUNTED = {"payload": "without headers", "file": "with headers"}


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


def avif(image: Tensor, quality: int, shrink: int = 1) -> Coded:
    """AVIF, 4:2:0, at the encoder's default speed; quality 0 to 100."""
    data, picture = _through(
        image, shrink, format="AVIF", quality=quality, subsampling="4:2:0", max_threads=1
    )
    position, payload = 0, 0
    while position < len(data):  # boxes of ISO/IEC 14496-12
        size = int.from_bytes(data[position : position + 4], "big") or len(data) - position
        if data[position + 4 : position + 8] == b"mdat":
            payload += size - 8
        position += max(size, 8)
    return Coded(payload, len(data), picture)


def jxl(image: Tensor, quality: int, shrink: int = 1) -> Coded:
    """JPEG XL, lossy, of the package pillow-jxl-plugin; quality 1 to 99."""
    import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]

    quality = min(max(1, quality), 99)
    data, picture = _through(image, shrink, format="JXL", quality=quality, lossless=False)
    return Coded(len(data) - 2, len(data), picture)  # 2: the signature of a bare codestream


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
    "avif": (avif, 100),
    "jxl": (jxl, 99),
}

#: How people write them.
TITLES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jxl": "JPEG XL"}

#: What is the same at every quality, in words.
SETTINGS = {
    "jpeg": "baseline, 4:2:0, standard Huffman tables",
    "webp": "lossy, method 6",
    "avif": "4:2:0, the encoder's default speed",
    "jxl": "lossy, the encoder's default effort",
}


def available() -> dict[str, bool]:
    """Return which codecs this environment has."""
    return {
        "jpeg": True,
        "webp": bool(features.check("webp")),
        "avif": bool(features.check("avif")),
        "jxl": importlib.util.find_spec("pillow_jxl") is not None,
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the codecs' libraries, on which their bytes depend a little."""
    found = {}
    for name in names:
        if name == "jxl":
            found[name] = f"pillow-jxl-plugin {version('pillow-jxl-plugin')}"
        elif name == "jpeg":
            found[name] = f"libjpeg {features.version('jpg')}"
        else:
            found[name] = f"lib{name} {features.version(name)}"
    return found


def checked_codecs(names: Any) -> list[str]:
    """Return `eval.codecs`; those of "all" that this environment has.

    Raises:
        ConfigError: for a name that is not a codec, or one that is not installed.
    """
    here = available()
    if names == "all":
        return [name for name in CODECS if here[name]]
    wanted = [] if names is None else names if isinstance(names, list) else [names]
    for name in wanted:
        if name not in CODECS:
            raise ConfigError(
                f"eval.codecs: no codec {name}{nearest(str(name), CODECS)}; there are: "
                f"{', '.join(CODECS)}"
            )
        if not here[name]:
            hint = "; pip install pillow-jxl-plugin" if name == "jxl" else ""
            raise ConfigError(f"eval.codecs: Pillow has no {TITLES[name]} here{hint}")
    return list(wanted)


def best_within(
    code: Callable[[int], Coded], highest: int, max_bytes: int, counted: str = "payload"
) -> Coded | None:
    """The result of the highest quality that fits, by bisection; None if none does.

    Args:
        code: from quality to a coded image.
        highest: quality.
        max_bytes: it must fit into.
        counted: `payload` or `file`: what has to fit.
    """
    best, low, high = None, 0, highest
    while low <= high:
        middle = (low + high) // 2
        result = code(middle)
        if getattr(result, counted) <= max_bytes:
            best, low = result, middle + 1
        else:
            high = middle - 1
    return best


def mean_psnr(originals: Tensor, pictures: Tensor) -> dict[str, float]:
    """Return the PSNR of the pictures `(B, C, H, W)` uint8: the mean of the images' own, in dB."""
    values = PSNR().per_image(originals, pictures)
    return {"psnr": float(values.mean())}


def codec_curves(
    images: Tensor,
    max_bytes: Iterable[int],
    name: str,
    counted: Sequence[str] = ("payload",),
    measure: Callable[[Sequence[Tensor]], Sequence[Mapping[str, Any]]] | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, list[dict[str, Any]]]:
    """Return metrics of a codec at a number of bytes.

    For every image and size in `SHRINKS` the quality is searched so that the result just fits;
    the size that gives the highest PSNR counts.

    Args:
        images: `(B, C, H, W)` uint8, C 1 or 3.
        max_bytes: limits; one that some image exceeds even at the lowest quality is left out.
        name: of the codec.
        counted: what has to fit, each by itself: `payload` (bytes without headers), `file` (with).
        measure: from pictures `(B, C, H, W)` uint8 of all limits that are left to numbers of each;
            None for PSNR.
        advance: told of each image that is done.

    Returns:
        For each way of counting a list of `max_bytes`, mean `payload_bytes` and `file_bytes`, and
        what `measure` returns.
    """
    codec, highest = CODECS[name]
    places = [(way, limit) for way in counted for limit in sorted(set(max_bytes))]
    found: dict[tuple[str, int], list[Coded | None]] = {place: [] for place in places}
    for image in images:  # an image's codings are forgotten before the next one's
        sizes = [cache(partial(_coded, codec, image, shrink)) for shrink in SHRINKS]
        for way, limit in places:
            found[way, limit].append(_best_size(image, sizes, highest, limit, way))
        advance(1)
    points: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {way: [] for way in counted}
    pictures: list[Tensor] = []
    for (way, limit), results in found.items():
        coded = [c for c in results if c is not None]
        if not coded or len(coded) < len(images):
            continue
        points.append(
            {
                "max_bytes": limit,
                "payload_bytes": math.fsum(c.payload for c in coded) / len(coded),
                "file_bytes": math.fsum(c.file for c in coded) / len(coded),
            }
        )
        curves[way].append(points[-1])
        pictures.append(torch.stack([c.picture for c in coded]))
    measure = measure or (lambda made: [mean_psnr(images, each) for each in made])
    for point, numbers in zip(points, measure(pictures), strict=True):
        point |= numbers
    return curves


def _coded(
    codec: Callable[[Tensor, int, int], Coded], image: Tensor, shrink: int, quality: int
) -> Coded:
    return codec(image, quality, shrink)


def _best_size(
    image: Tensor,
    sizes: Sequence[Callable[[int], Coded]],
    highest: int,
    max_bytes: int,
    counted: str,
) -> Coded | None:
    found = (best_within(coder, highest, max_bytes, counted) for coder in sizes)
    return min(
        (coded for coded in found if coded is not None),
        key=lambda c: float((c.picture.float() - image).square().mean()),
        default=None,
    )
