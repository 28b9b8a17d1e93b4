"""One shard of tokens: a safetensors file of flat arrays, mapped into memory.

Equal samples give equal bytes, and a file appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import DataError
from vistok.core.files import parse_json, replacing

#: Types of ids, by size.
DTYPES = ("uint8", "uint16", "uint32")

_NAMES = {"U8": "uint8", "U16": "uint16", "U32": "uint32", "I64": "int64"}

#: Types that no array of ours has, to say what was found.
_OTHERS = {"I8": "int8", "I16": "int16", "I32": "int32", "U64": "uint64"}
_OTHERS |= {"F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool"}

_CODES = {name: code for code, name in _NAMES.items()}

_CHUNK = 1 << 22  # ids looked at at once


@dataclass
class ShardRows:
    """Samples of a shard that is being made.

    Attributes:
        ids: `(n, Q)` of each sample.
        labels: class of each; -1 for none.
        keys: name of each sample's image.
        views: which crop or flip it is.
        captions: text of each, or None.
        left_out: key and reason of the images that could not be used.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def write_shard(
    path: Path, rows: ShardRows, sizes: Sequence[int], dtype: str, notes: dict[str, str]
) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: of the file.
        rows: its samples; there may be none.
        sizes: of the Q streams.
        dtype: of the ids, one of `DTYPES`.
        notes: kept in the file's header, such as the plan it was made by.

    Raises:
        DataError: if an id is out of range, or `dtype` cannot hold the streams' ids.
    """
    if max(sizes) - 1 > np.iinfo(dtype).max:
        raise DataError(f"{path}: {dtype} cannot hold ids up to {max(sizes) - 1}")
    empty = np.zeros((0, len(sizes)), dtype=np.int64)
    ids = np.concatenate([empty, *rows.ids])
    check_range(path, ids, sizes)
    keys, key_ends = _texts(rows.keys)
    captions, caption_ends = _texts([caption or "" for caption in rows.captions])
    has = np.array([caption is not None for caption in rows.captions], dtype=np.uint8)
    arrays = {
        "ids": ids.astype(dtype),
        "ends": np.cumsum([len(sample) for sample in rows.ids], dtype=np.int64),
        "labels": np.array(rows.labels, dtype=np.int64),
        "views": np.array(rows.views, dtype=np.int64),
        "keys": keys,
        "key_ends": key_ends,
        "captions": captions,
        "caption_ends": caption_ends,
        "has_caption": has,
    }
    notes = {**notes, "left_out": json.dumps(rows.left_out)}
    with replacing(path) as file:
        file.write(serialized(arrays, notes))


def _texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends


def serialized(arrays: dict[str, np.ndarray], notes: dict[str, str]) -> bytes:
    """Return a safetensors file of arrays, of which equal ones give equal bytes."""
    # safetensors' own writer orders tensors by a hash table's whim where types are equal.
    header: dict[str, Any] = {"__metadata__": dict(sorted(notes.items()))}
    place = 0
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, array in ordered:
        code, shape = _CODES[array.dtype.name], list(array.shape)
        header[name] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    little = [array.astype(array.dtype.newbyteorder("<"), copy=False) for _, array in ordered]
    return b"".join([len(text).to_bytes(8, "little"), text, *(a.tobytes() for a in little)])


class ShardArrays:
    """The arrays of a shard, mapped.

    Args:
        path: of the file.
        arrays: by name.
        notes: of the header.
        sizes: of the Q streams.
    """

    def __init__(
        self,
        path: Path,
        arrays: dict[str, np.ndarray],
        notes: dict[str, str],
        sizes: Sequence[int],
    ) -> None:
        self.path, self.notes, self._sizes = path, notes, list(sizes)
        self.flat = arrays["ids"]
        self.ends, self.labels, self.views = arrays["ends"], arrays["labels"], arrays["views"]
        self._keys, self._key_ends = arrays["keys"], arrays["key_ends"]
        self._captions, self._caption_ends = arrays["captions"], arrays["caption_ends"]
        self._has_caption = arrays["has_caption"]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all samples."""
        return len(self.flat)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Return key and reason of the images that could not be used."""
        return [(key, reason) for key, reason in parse_json(self.notes.get("left_out", "[]"))]

    @property
    def has_captions(self) -> bool:
        """Return whether any sample has a text."""
        return bool(self._has_caption.any())

    def tokens(self, row: int) -> np.ndarray:
        """Return the ids `(n, Q)` of a sample, as they are stored."""
        return self.flat[self._begin(self.ends, row) : int(self.ends[row])]

    def length(self, row: int) -> int:
        """Return the number of tokens of a sample."""
        return int(self.ends[row]) - self._begin(self.ends, row)

    def key(self, row: int) -> str:
        """Return the name of a sample's image."""
        return self._text(self._keys, self._key_ends, row)

    def caption(self, row: int) -> str | None:
        """Return the text of a sample, if it has one."""
        if not self._has_caption[row]:
            return None
        return self._text(self._captions, self._caption_ends, row)

    def _text(self, texts: np.ndarray, ends: np.ndarray, row: int) -> str:
        part = texts[self._begin(ends, row) : int(ends[row])].tobytes()
        return part.decode("utf-8", "surrogateescape")

    @staticmethod
    def _begin(ends: np.ndarray, row: int) -> int:
        return int(ends[row - 1]) if row else 0

    def verify(self, sha256: str) -> None:
        """Compare the checksum of the file and the range of its ids.

        Raises:
            DataError: if they are not as they should be.
        """
        if (found := file_sha256(self.path)) != sha256:
            raise DataError(
                f"{self.path}: altered: its checksum begins with {found[:12]}, and the manifest's "
                f"with {sha256[:12]}; copy it again"
            )
        check_range(self.path, self.flat, self._sizes)


def open_shard(path: Path, sizes: Sequence[int]) -> ShardArrays:
    """Map the arrays of a shard.

    Args:
        path: of the file.
        sizes: of the Q streams.

    Raises:
        DataError: if it cannot be read, or is not what `write_shard` writes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as checked:  # offsets and sizes against the bytes that there are
            notes = dict(checked.metadata() or {})
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
        content = np.memmap(path, dtype=np.uint8, mode="r")[8 + length :]
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:120]})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    arrays = {
        name: _view(content, entry) for name, entry in header.items() if name != "__metadata__"
    }
    _check_arrays(path, arrays, len(sizes))
    return ShardArrays(path, arrays, notes, sizes)


def _view(content: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    name = (_NAMES | _OTHERS).get(entry["dtype"])
    if name is None:
        return np.zeros(0, dtype=object)  # which no array may be
    kind = np.dtype(name).newbyteorder("<")
    return content[begin:end].view(kind).reshape(entry["shape"])


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], streams: int) -> None:
    wanted = {
        **dict.fromkeys(("ends", "labels", "views", "key_ends", "caption_ends"), "int64"),
        **dict.fromkeys(("keys", "captions", "has_caption"), "uint8"),
    }
    if missing := [name for name in ("ids", *wanted) if name not in arrays]:
        raise DataError(f"{path}: not a shard of tokens: has no array '{missing[0]}'")
    if arrays["ids"].dtype.name not in DTYPES:
        raise DataError(
            f"{path}: ids: expected {', '.join(DTYPES)}, found {arrays['ids'].dtype.name}"
        )
    for name, kind in wanted.items():
        if arrays[name].dtype.name != kind or arrays[name].ndim != 1:
            raise DataError(f"{path}: {name}: expected one row of {kind}")
    if arrays["ids"].ndim != 2 or arrays["ids"].shape[1] != streams:
        shape = tuple(arrays["ids"].shape)
        raise DataError(f"{path}: ids: expected {streams} to a token, found shape {shape}")
    samples = len(arrays["ends"])
    for name in ("labels", "views", "key_ends", "caption_ends", "has_caption"):
        if len(arrays[name]) != samples:
            raise DataError(f"{path}: {name}: expected {samples}, found {len(arrays[name])}")
    for ends, of in (("ends", "ids"), ("key_ends", "keys"), ("caption_ends", "captions")):
        values = arrays[ends]
        last = int(values[-1]) if samples else 0
        rising = not samples or (values[0] >= 0 and bool((np.diff(values) >= 0).all()))
        if not rising or last != len(arrays[of]):
            raise DataError(f"{path}: {ends}: must rise from 0 to {len(arrays[of])}")


def check_range(path: Path, ids: np.ndarray, sizes: Sequence[int]) -> None:
    """Raise a DataError if an id of `(n, Q)` is not below the size of its stream."""
    for begin in range(0, len(ids), _CHUNK):
        part = ids[begin : begin + _CHUNK]
        for stream, size in enumerate(sizes):
            low, high = int(part[:, stream].min()), int(part[:, stream].max())
            if low < 0 or high >= size:
                bad = low if low < 0 else high
                raise DataError(
                    f"{path}: ids of stream {stream}: found {bad}, valid are 0 to {size - 1}"
                )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
