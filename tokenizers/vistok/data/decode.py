"""Decode image bytes of any common kind to one array of one shape.

No torch here: `make-shards` checks images with this module alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from vistok.data.deep import DeepError, Range, is_deep, levels
from vistok.data.formats import HEAD, PLUGINS, readable, refusal, sniffed

#: Pixels of an image as it is stored, unless told otherwise: what fits in a few GB while decoding.
MAX_PIXELS = 180_000_000

_JPEG_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Modes whose conversion by Pillow means what it says.
_CONVERTED = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
)

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


def decode(
    data: bytes,
    channels: int = 3,
    reduction: Reduction | None = None,
    value_range: Range | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode an image file.

    Palettes, CMYK, grayscale, alpha and images of more than 8 bits are converted; EXIF orientation
    is applied. Where alpha is not wanted it is blended over white, because the color under
    transparent pixels is arbitrary. Of several frames or pages the first is taken.

    Args:
        data: the file's bytes.
        channels: 1 (luma), 3 (RGB) or 4 (RGB and alpha).
        reduction: says how many times smaller a JPEG may be decoded: from fewer of its
            frequencies, which costs less. Other formats are decoded as they are.
        value_range: the values that become 0 and 255, of images of more than 8 bits; None for
            those of their type, which floats and 32-bit integers do not have.
        max_pixels: of the image as it is stored; larger ones are refused before their pixels are
            read.

    Returns:
        `(H, W, channels)` uint8, contiguous and writable; H and W are divided by the reduction
        and rounded up.

    Raises:
        DecodeError: if the bytes are no image, are cut short or damaged; if the image is too
            large, or of a kind that is not read.
    """
    decoded = _decode_jpeg(data, channels, reduction, max_pixels)
    array, orientation = decoded or _decode_pillow(data, channels, value_range, max_pixels)
    if orientation in _UPRIGHT:
        array = _UPRIGHT[orientation](array)
    return np.ascontiguousarray(array)


def _decode_jpeg(
    data: bytes, channels: int, reduction: Reduction | None, max_pixels: int
) -> tuple[np.ndarray, int] | None:
    """Decode with simplejpeg (twice Pillow's speed); None for what it cannot or should not do."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(height), int(width)
        if height * width > max_pixels or colours not in ("YCbCr", "RGB", "Gray"):
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
    """Return the orientation in a JPEG's EXIF or XMP; 1 (upright) if there is none."""
    if not _may_be_turned(jpeg):  # spares the parsing
        return 1
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return _said(image)
    except Exception:  # a broken EXIF block does not make the picture worse
        return 1


def _said(image: Image.Image) -> int:
    """Return the orientation that an image's EXIF or XMP says; 1 for none and for nonsense."""
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the picture worse
        return 1
    return said if isinstance(said, int) and 1 <= said <= 8 else 1


def _may_be_turned(jpeg: bytes) -> bool:
    """Return whether one of the segments before the picture is EXIF's, or XMP's with a turn."""
    place = 2
    while (head := jpeg[place : place + 10])[:1] == b"\xff" and head[1:2] != b"\xda":
        length = int.from_bytes(head[2:4], "big")
        if head[1:2] == b"\xe1":
            if head[4:] == b"Exif\0\0":
                return True
            if head[4:] == b"http:/" and b"tiff:Orientation" in jpeg[place : place + 2 + length]:
                return True
        filling = head[1:2] == b"\xff"
        place += 1 if filling else 2 + length
    return False


@contextmanager
def _limited(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse what is far above the limit, such as the images inside an icon.

    Its warnings are for developers.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels  # an error from twice as many on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decode_pillow(
    data: bytes, channels: int, value_range: Range | None, max_pixels: int
) -> tuple[np.ndarray, int]:
    formats = _with_plugin(data)
    try:
        with _limited(max_pixels), Image.open(io.BytesIO(data), formats=formats) as image:
            check_pixels(image.height, image.width, max_pixels)
            if value_range is not None and _is_cut_to_eight_bits(image):
                reason = f"{image.mode} of 16 bits is read at 8: data.value_range cannot be applied"
                raise DecodeError(reason, "not read")
            image.load()  # before the orientation: a TIFF is turned by Pillow
            orientation = _said(image)
            converted = _convert(image, channels, value_range)
    except (DecodeError, DeepError) as error:
        raise DecodeError(str(error), error.cause) from None
    except Image.DecompressionBombError:
        raise _too_large(f"more than {2 * max_pixels} pixels", max_pixels) from None
    except UnidentifiedImageError:
        raise DecodeError(*refusal(data)) from None
    except MemoryError:
        raise DecodeError("asks for more memory than there is", "too large") from None
    except Exception as error:  # Pillow's plugins raise almost everything on damaged input
        raise DecodeError(" ".join(str(error).split()) or type(error).__name__) from None
    array = np.array(converted)
    return array.reshape(*array.shape[:2], channels), orientation


def _with_plugin(data: bytes) -> tuple[str, ...]:
    """Return the formats to open; where a format needs a plugin, which is installed, with it."""
    plugin = PLUGINS.get(sniffed(data[:HEAD]))
    if plugin is None:
        return readable()
    try:
        module = __import__(plugin[2])
        getattr(module, "register_heif_opener", lambda: None)()
    except ImportError:
        return readable()  # which the refusal then names
    return (plugin[0],)


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raise if an image has more pixels than are allowed.

    Raises:
        DecodeError: of the cause "too large".
    """
    if height * width > max_pixels:
        raise _too_large(f"{height} x {width} pixels", max_pixels)


def _too_large(what: str, max_pixels: int) -> DecodeError:
    return DecodeError(f"{what}, above data.max_pixels={max_pixels}", "too large")


def _convert(image: Image.Image, channels: int, value_range: Range | None) -> Image.Image:
    if is_deep(image):
        pixels, opaque = levels(image, value_range)
        image = Image.fromarray(pixels)
        if opaque is not None:
            image.putalpha(Image.fromarray(opaque))
    elif image.mode not in _CONVERTED:
        reason = f"is of mode {image.mode}, which is not read; convert it to RGB"
        raise DecodeError(reason, "not read")
    if channels != 4 and image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    return image.convert(_PILLOW_MODES[channels])


def _is_cut_to_eight_bits(image: Image.Image) -> bool:
    """Return whether Pillow reads the high bytes only, as it does of colors of 16 bits."""
    tiles = str(getattr(image, "tile", ""))
    return not is_deep(image) and (";16" in tiles or "; 16" in tiles)
