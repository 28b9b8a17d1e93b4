"""Arrays from files that are not trusted: sizes are held against the bytes, nothing is unpickled.

`numpy.load` reserves what a header announces before it looks at how much there is.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def array_of(data: bytes) -> np.ndarray:
    """Return the array of an `.npy` file; it is read-only and shares the bytes' memory.

    Raises:
        ValueError: saying in a few words what is wrong.
    """
    stream = io.BytesIO(data)
    try:
        shape, columns_first, dtype = _HEADERS[npy.read_magic(stream)](stream)
    except Exception:  # the header is Python's syntax, whose parser raises almost everything
        raise ValueError("is not a readable array of numbers") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read")
    if dtype.kind not in "biufcSU" or not dtype.itemsize:
        raise ValueError(f"is an array of {dtype}, not of numbers")
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError("is not a readable array of numbers")
    count, there = math.prod(shape), len(data) - stream.tell()
    if count * dtype.itemsize != there:
        said = f"{dtype} {list(shape)}"
        raise ValueError(f"says {said}, {count * dtype.itemsize} bytes, but holds {there}")
    array = np.frombuffer(data, dtype, count, stream.tell())
    return array.reshape(shape, order="F" if columns_first else "C")


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an uncompressed `.npz` file by their names.

    Raises:
        ValueError: if it is none, is damaged, or says what cannot be.
        OSError: if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("is compressed")
                found[info.filename.removesuffix(".npy")] = array_of(archive.read(info))
            return found
    except OSError:
        raise
    except Exception as error:  # zipfile and struct raise almost everything on damaged files
        raise ValueError(f"is not a readable set of arrays ({error})") from None
