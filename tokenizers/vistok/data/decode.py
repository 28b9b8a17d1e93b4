"""Decode image bytes of any common kind to one array of one shape.

No torch here: `make-shards` checks images with this module alone.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

# Member and file names that we take for images.
IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "png", "webp", "bmp", "tif", "tiff", "gif"}
    | {"ppm", "pgm", "pnm", "jp2", "avif"}
)

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\0\0\0\x0cjP  ": "jp2",
    b"P5": "pgm",
    b"P6": "ppm",
}

_JPEG_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# What brings an array with EXIF orientation k upright.
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


class DecodeError(ValueError):
    """This one image cannot be used.

    Args:
        message: the reason, in a few words.
        cause: the kind of reason, by which such images are counted.
    """

    def __init__(self, message: str, cause: str = "damaged"):
        super().__init__(message)
        self.cause = cause


Reduction = Callable[[int, int], int]  # upright height and width to 1, 2, 4 or 8


def decode(data: bytes, channels: int = 3, reduction: Reduction | None = None) -> np.ndarray:
    """Decode an image file.

    Palettes, CMYK, grayscale, alpha and 16-bit images are converted; EXIF orientation is applied.
    Where alpha is not wanted it is blended over white, because the colour under transparent
    pixels is arbitrary.

    Args:
        data: the file's bytes.
        channels: 1 (luma), 3 (RGB) or 4 (RGB and alpha).
        reduction: says how many times smaller a JPEG may be decoded: from fewer of its
            frequencies, which costs less. Other formats are decoded as they are.

    Returns:
        `(H, W, channels)` uint8, contiguous and writable; H and W are divided by the reduction
        and rounded up.

    Raises:
        DecodeError: if the bytes are no image, are cut short or damaged.
    """
    decoded = _decode_jpeg(data, channels, reduction)
    array, orientation = decoded or _decode_pillow(data, channels)
    if orientation in _UPRIGHT:
        array = _UPRIGHT[orientation](array)
    return np.ascontiguousarray(array)


def image_extension(data: bytes, name: str) -> str:
    """Return the extension for an image file: by its first bytes, else as in `name`.

    Files are often misnamed, and readers of shards choose their decoder by the extension.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] == b"ftypavif":
        return "avif"
    for magic, extension in _MAGIC.items():
        if data.startswith(magic):
            return extension
    return name.rpartition(".")[2].lower()


def _decode_jpeg(
    data: bytes, channels: int, reduction: Reduction | None
) -> tuple[np.ndarray, int] | None:
    """Decode with simplejpeg (twice Pillow's speed); None for what it cannot or should not do."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(height), int(width)
        too_large = height * width > (Image.MAX_IMAGE_PIXELS or sys.maxsize)
        if too_large or colours not in ("YCbCr", "RGB", "Gray"):
            return None
        orientation = _orientation(data)
        least = (0, 0)
        if reduction is not None:
            upright = (width, height) if orientation >= 5 else (height, width)
            factor = reduction(*upright)
            # The decoder takes the smallest of its scales that reaches this: exactly 1/factor.
            least = (0, 0) if factor == 1 else (-(-height // factor), -(-width // factor))
        array = simplejpeg.decode_jpeg(
            data, colorspace=_JPEG_COLOURS[channels], min_height=least[0], min_width=least[1]
        )
    except ValueError:
        return None  # damaged, or only unusual: Pillow tells the two apart
    return array.reshape(*array.shape[:2], channels), orientation


def _orientation(jpeg: bytes) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none."""
    if not _has_exif(jpeg):  # spares the parsing
        return 1
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the picture worse
        return 1


def _has_exif(jpeg: bytes) -> bool:
    """Return whether one of the segments before the picture is EXIF's."""
    place = 2
    while (head := jpeg[place : place + 10])[:1] == b"\xff" and head[1:2] != b"\xda":
        if head[1:2] == b"\xe1" and head[4:] == b"Exif\0\0":
            return True
        filling = head[1:2] == b"\xff"
        place += 1 if filling else 2 + int.from_bytes(head[2:4], "big")
    return False


def _decode_pillow(data: bytes, channels: int) -> tuple[np.ndarray, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            converted = _convert(image, channels)
    except Exception as error:  # Pillow's plugins raise almost everything on damaged input
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image, or of an unknown format"
            raise DecodeError(reason, "not an image") from None
        raise DecodeError(" ".join(str(error).split()) or type(error).__name__) from None
    array = np.array(converted)
    return array.reshape(*array.shape[:2], channels), orientation


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grayscale; Pillow's own conversion would clip it to white.
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(deep / 257), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        deep = np.nan_to_num(np.asarray(image, dtype=np.float64))
        deep = deep * 255 if deep.max(initial=0) <= 1 else deep
        image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
    if channels != 4 and image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    return image.convert(_PILLOW_MODES[channels])
