"""Arrays from files that are not trusted: sizes are held against the bytes, nothing is unpickled.

`numpy.load` reserves what a header announces before it looks at how much there is. It also reads
the header as Python's syntax, which Python before 3.11.8 and 3.12.2 cannot do in several threads:
now and then `ast` fails with "AST constructor recursion depth mismatch". Here a pattern reads it.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from pathlib import Path

import numpy as np

_MAGIC = b"\x93NUMPY"
_LENGTHS = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}  # of the header, by version
_ITEM = r"\s*['\"](\w+)['\"]\s*:\s*(['\"][^'\"]*['\"]|True|False|\([\dL,\s]*\))\s*"
_HEADER = re.compile(rf"\{{{_ITEM},{_ITEM},{_ITEM},?\s*\}}\s*")


def array_of(data: bytes) -> np.ndarray:
    """Return the array of an `.npy` file; it is read-only and shares the bytes' memory.

    Raises:
        ValueError: saying in a few words what is wrong.
    """
    try:
        shape, columns_first, dtype, begin = _header(data)
    except (ValueError, KeyError, TypeError, SyntaxError, struct.error):
        raise ValueError("is not a readable array of numbers") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read")
    if dtype.kind not in "biufcSU" or not dtype.itemsize:
        raise ValueError(f"is an array of {dtype}, not of numbers")
    count, there = math.prod(shape), len(data) - begin
    if count * dtype.itemsize != there:
        said = f"{dtype} {list(shape)}"
        raise ValueError(f"says {said}, {count * dtype.itemsize} bytes, but holds {there}")
    array = np.frombuffer(data, dtype, count, begin)
    return array.reshape(shape, order="F" if columns_first else "C")


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, whether columns come first, type, and where the numbers begin."""
    if not data.startswith(_MAGIC):
        raise ValueError
    length = _LENGTHS[data[6:8]]
    begin = 8 + struct.calcsize(length)
    end = begin + struct.unpack_from(length, data, 8)[0]
    found = _HEADER.fullmatch(data[begin:end].decode("latin-1"))
    if end > len(data) or found is None:
        raise ValueError
    names, values = found.groups()[::2], found.groups()[1::2]
    items = dict(zip(names, values, strict=True))
    if items["fortran_order"] not in ("True", "False"):
        raise ValueError
    sides = re.fullmatch(r"\((?:\s*\d+L?\s*,)*(?:\s*\d+L?)?\s*\)", items["shape"])
    if sides is None:
        raise ValueError
    shape = tuple(int(side) for side in re.findall(r"\d+", items["shape"]))
    return shape, items["fortran_order"] == "True", np.dtype(items["descr"].strip("'\"")), end


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
