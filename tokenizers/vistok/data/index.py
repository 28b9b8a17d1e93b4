"""The index of a tar, which makes a shard randomly readable.

A shard `x.tar` of ours comes with its index `x.idx`. Any other tar is read through once, header by
header, and its index kept in the cache folder. An index is an uncompressed npz of plain arrays
(nothing in it is ever unpickled) and is as reproducible as the tar.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vistok.core.errors import DataError
from vistok.core.files import cache_dir, replacing
from vistok.data.decode import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

FORMAT = 2  # of the index files; another number is indexed anew

# As WebDataset has it: the key ends at the first dot of the file name, and keeps the folder.
_MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$")

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}


class Row(NamedTuple):
    """One sample of a tar: key, place of the image's bytes, label, pixels, and other members."""

    key: bytes
    offset: int
    size: int
    label: int = -1
    height: int = 0
    width: int = 0
    others: Mapping[str, tuple[int, int]] = {}  # extension to offset and size


@dataclass(frozen=True)
class ShardIndex:
    """One row per sample of a tar, in the tar's order.

    Attributes:
        keys: `(n,)` bytes (UTF-8).
        offsets: `(n,)` int64, where the image's bytes begin in the tar.
        sizes: `(n,)` int64, how many they are.
        labels: `(n,)` int64, the number in the sample's `.cls` member; -1 without one.
        heights: `(n,)` int32, of the upright image in pixels; 0 if never looked at.
        widths: `(n,)` int32, as heights.
        others: `(e,)` str, the extensions of further members (captions, embeddings), sorted.
        other_offsets: `(e, n)` int64, where their bytes begin; -1 where a sample has none.
        other_sizes: `(e, n)` int64, how many they are.
        tar_bytes: size of the tar that this describes.
        plan: what the writer made the shard from, for restarts; empty for foreign tars.
    """

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    others: np.ndarray
    other_offsets: np.ndarray
    other_sizes: np.ndarray
    tar_bytes: int
    plan: str = ""

    @classmethod
    def of(cls, rows: Sequence[Row], tar_bytes: int, plan: str = "") -> ShardIndex:
        """Make the index of at least one row."""
        others = sorted({extension for row in rows for extension in row.others})
        places = np.array(
            [[row.others.get(extension, (-1, 0)) for row in rows] for extension in others],
            dtype=np.int64,
        ).reshape(len(others), len(rows), 2)
        return cls(
            keys=np.array([row.key for row in rows]),
            offsets=np.array([row.offset for row in rows], dtype=np.int64),
            sizes=np.array([row.size for row in rows], dtype=np.int64),
            labels=np.array([row.label for row in rows], dtype=np.int64),
            heights=np.array([row.height for row in rows], dtype=np.int32),
            widths=np.array([row.width for row in rows], dtype=np.int32),
            others=np.array(others, dtype=str),
            other_offsets=np.ascontiguousarray(places[:, :, 0]),
            other_sizes=np.ascontiguousarray(places[:, :, 1]),
            tar_bytes=tar_bytes,
            plan=plan,
        )

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all; equal indexes give equal bytes."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        arrays["format"] = np.asarray(FORMAT)
        with replacing(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """Read an index; None if there is none of ours (DALI's also end in .idx)."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if int(arrays["format"]) != FORMAT:
                    return None
                found = {f.name: arrays[f.name] for f in fields(cls)}
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
            return None
        found["tar_bytes"], found["plan"] = int(found["tar_bytes"]), str(found["plan"])
        return cls(**found)


def sidecar(tar: Path) -> Path:
    """Return the path of the index that our writer makes for a tar."""
    return tar.with_suffix(".idx")


def index_of(tar: Path) -> ShardIndex:
    """Return the index of a tar: its sidecar, the cached one, or made now and cached.

    Raises:
        DataError: if the tar is missing, no tar, cut short, or holds no images.
    """
    try:
        status = tar.stat()
    except OSError as error:
        raise DataError(f"{tar}: no such shard ({error.strerror})") from None
    index = ShardIndex.load(sidecar(tar))
    if index is not None and index.tar_bytes == status.st_size:
        return index
    if index is not None and index.tar_bytes > status.st_size:
        raise DataError(
            f"{tar} is cut short: {status.st_size} bytes, but its index {sidecar(tar).name} says"
            f" {index.tar_bytes}; copy or write it again"
        )
    name = f"{tar.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    cached = cache_dir() / "index" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.idx"
    index = ShardIndex.load(cached)
    if index is None:
        log.info("indexing %s (once; kept in %s)", tar, cached.parent)
        index = scan(tar)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            index.save(cached)
        except OSError as error:  # a cache that cannot be written costs time, not the run
            log.warning("cannot save the index of %s: %s", tar, error)
    return index


def scan(tar: Path) -> ShardIndex:
    """Index a tar by one pass over its headers.

    Raises:
        DataError: if it is not a tar, cut short, damaged, or holds no images.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    sample: Row | None = None  # being read; its members are adjacent
    with open(tar, "rb") as file:
        length = file.seek(0, 2)
        file.seek(0)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (holds nothing)
        except tarfile.TarError:
            raise DataError(f"{tar} is not a tar file: {_what(tar)}") from None
        try:
            for member in archive:
                match = _MEMBER.match(member.name)
                if not member.isreg() or not match:
                    continue
                key, extension = match[1].encode(), match[2].lower()
                if sample is None or key != sample.key:
                    rows += [sample] if sample and sample.offset >= 0 else []
                    sample = Row(key, -1, 0, others={})
                seen.add(extension)
                place = member.offset_data, member.size
                if extension in IMAGE_EXTENSIONS and sample.offset < 0:
                    sample = sample._replace(offset=place[0], size=place[1])
                elif extension == "cls" and member.size <= 20:
                    sample = sample._replace(label=_label(file, member))
                else:
                    sample = sample._replace(others={extension: place, **sample.others})
            rows += [sample] if sample and sample.offset >= 0 else []
            end = archive.offset
            file.seek(end)
            tail = file.read(tarfile.BLOCKSIZE)
        except tarfile.TarError:
            end, tail = length, b""
    if len(tail) < tarfile.BLOCKSIZE:
        raise DataError(
            f"{tar} is cut short: its {length} bytes end in the middle of a member or before the"
            " end mark; copy or write it again"
        )
    if tail.strip(b"\0"):
        raise DataError(f"{tar} is damaged: no valid tar header at byte {end}; copy it again")
    if not rows:
        found = ", ".join(f".{e}" for e in sorted(seen)[:5]) or "nothing"
        raise DataError(f"{tar} contains no images: found {found}; expected .jpg, .png, .webp, ...")
    return ShardIndex.of(rows, length)


def _label(file, member: tarfile.TarInfo) -> int:
    """Return the number in a `.cls` member, else -1; leave the file at its position."""
    place = file.tell()
    file.seek(member.offset_data)
    text = file.read(member.size)
    file.seek(place)
    try:
        return int(text)
    except ValueError:
        return -1


def _what(path: Path) -> str:
    """Say what a file seems to be that is not a tar, and what would be right."""
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        return "it is empty (0 bytes)"
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return f"it is {name}-compressed; unpack it to a plain .tar first"
    return f"it begins with {head!r}; shards are plain (uncompressed) tars"
