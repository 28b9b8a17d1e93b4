"""Ids to bytes: the digits of one number."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: For each id of a code, the lowest value that it can have and how many values there are.
Alphabet = Sequence[tuple[int, int]]


def packed_size(alphabet: Alphabet) -> int:
    """Bytes that the largest code needs, and that every code of this alphabet gets."""
    codes = math.prod(size for _, size in alphabet)
    return ((codes - 1).bit_length() + 7) // 8


def pack(ids: Sequence[int], alphabet: Alphabet) -> bytes:
    """The ids of a code, first the most significant, as `packed_size` bytes.

    In a mixed radix and not with whole bits for each id: of a codebook of 64 000 an id takes
    15.97 bits.
    """
    number = 0
    for value, (lowest, size) in zip(ids, alphabet, strict=True):
        number = number * size + value - lowest
    return number.to_bytes(packed_size(alphabet), "big")


def unpack(data: bytes | memoryview, alphabet: Alphabet) -> list[int]:
    """Inverse of `pack`.

    Raises:
        ValueError: if no code has these bytes.
    """
    if len(data) != packed_size(alphabet):
        raise ValueError(f"{len(data)} bytes, where {packed_size(alphabet)} are expected")
    number, ids = int.from_bytes(data, "big"), []
    for lowest, size in reversed(alphabet):
        number, value = divmod(number, size)
        ids.append(lowest + value)
    if number:
        raise ValueError("a number beyond the last code")
    return ids[::-1]
