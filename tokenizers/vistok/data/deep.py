"""Images of more than 8 bits: integers and floats of one channel, made levels 0 to 255.

Which value is white is never guessed from an image: it follows from the file's type (65535 of 16
bits, 4095 of a TIFF that says 12), or is told for the whole data set (`data.value_range`).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

Range = tuple[float, float]

_ROWS_OF = 1 << 20  # pixels that are converted at once

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags

_UNSIGNED, _SIGNED = 1, 2


class DeepError(ValueError):
    """An image whose values have no range that is known."""

    cause = "not read"


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits, or of 8 with a sign."""
    signed = image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == _SIGNED
    return signed or image.mode == "F" or image.mode.startswith("I")


def levels(image: Image.Image, value_range: Range | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return an image's levels, and where it is opaque.

    Args:
        image: for which `is_deep` holds, loaded.
        value_range: values that become 0 and 255; None for those of the file's type.

    Returns:
        `(H, W)` uint8, rounded to the nearest level and clipped; and `(H, W)` uint8, 0 where the
        file calls a value transparent, or None if it does not.

    Raises:
        DeepError: if the range is not known, or a value is not a number.
    """
    if image.mode == "L":
        raise DeepError("is of 8 bits with a sign, which is not read; convert it to PNG")
    values = np.asarray(image)
    unsigned = image.format == "TIFF" and _tag(image, _SAMPLE_FORMAT) in (None, _UNSIGNED)
    if image.mode == "I" and unsigned and _bits(image) == 32:
        values = values.view(np.uint32)  # of which Pillow's 32 bits know nothing
    low, high = value_range or _own_range(image)
    out = np.empty(values.shape, np.uint8)
    step = max(1, _ROWS_OF // max(1, values.shape[1]))
    for top in range(0, len(values), step):
        rows = (values[top : top + step].astype(np.float64) - low) * (255 / (high - low))
        if np.isnan(rows).any():
            raise DeepError("has values that are not numbers (NaN)")
        out[top : top + step] = np.rint(np.clip(rows, 0, 255))
    if _tag(image, _PHOTOMETRIC) == 0:  # white is zero
        out = 255 - out
    clear = image.info.get("transparency")
    opaque = np.where(values == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
    return out, opaque


def _own_range(image: Image.Image) -> Range:
    """Return the range of a file's type."""
    if image.mode.startswith("I;16"):
        bits = _bits(image)
        return 0, 2 ** (bits if 8 < bits < 16 else 16) - 1
    if image.mode == "I" and image.format in ("PPM", "PNG"):  # 16 bits, scaled to all of them
        return 0, 65535
    what = "floating-point values" if image.mode == "F" else "integers of 32 bits or with a sign"
    raise DeepError(f"has {what}; say which are black and white: data.value_range=[LOW,HIGH]")


def _bits(image: Image.Image) -> int:
    return _tag(image, _BITS) or 0


def _tag(image: Image.Image, number: int) -> int | None:
    """Return the first value of a TIFF's tag; None of other formats."""
    found = getattr(image, "tag_v2", {}).get(number)
    found = found[0] if isinstance(found, tuple) and found else found
    return found if isinstance(found, int) else None
