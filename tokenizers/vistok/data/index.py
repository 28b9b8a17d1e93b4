"""The index of a tar, which makes a shard randomly readable.

A shard `x.tar` of ours comes with its index `x.idx`. Any other tar is read through once, header by
header, and its index kept in the cache folder. An index is an uncompressed npz of plain arrays
(nothing in it is ever unpickled) and is as reproducible as the tar.

An index is believed once it has proved that it belongs to its tar: it holds a checksum of the tar's
headers and labels, which takes a few percent of the tar to make again. That it did so is noted in
the cache folder with size, times and inode of the tar; while these stay, it is not asked again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vistok.core.errors import DataError
from vistok.core.files import cache_dir, replacing
from vistok.data.arrays import arrays_of
from vistok.data.names import shown
from vistok.data.samples import gather
from vistok.data.tar import Proof, TarReader

log = logging.getLogger(__name__)

FORMAT = 3  # of the index files; 2 had no proof, and others are not read

_RACY = 2 * 10**9  # ns in which a file may be written twice without its times telling


class Row(NamedTuple):
    """One sample of a tar: key, place of the image's bytes, label, pixels, and other members."""

    key: bytes
    offset: int
    size: int
    label: int = -1
    height: int = 0
    width: int = 0
    others: Mapping[str, tuple[int, int]] = {}  # extension to offset and size
    name: bytes = b""  # of the image's file, where it came from


@dataclass(frozen=True)
class ShardIndex:
    """One row per sample of a tar, in the tar's order.

    Attributes:
        keys: `(n,)` bytes.
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
        names: `(n,)` bytes, what the images were called before they were packed, or in the tar.
        left_out: `(m,)` bytes, members that are images or labels and cannot be used.
        reasons: `(m,)` bytes (UTF-8), why.
        proof: checksum of the tar's headers and labels, in hex; empty in the format before.
        proof_ranges: `(r, 2)` int64, offset and size of the parts of the tar that it is of.
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
    plan: str
    names: np.ndarray
    left_out: np.ndarray
    reasons: np.ndarray
    proof: str
    proof_ranges: np.ndarray

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        tar_bytes: int,
        plan: str = "",
        left_out: Sequence[tuple[bytes, str]] = (),
        proof: Proof | None = None,
    ) -> ShardIndex:
        """Make the index of at least one row."""
        others = sorted({extension for row in rows for extension in row.others})
        places = np.array(
            [[row.others.get(extension, (-1, 0)) for row in rows] for extension in others],
            dtype=np.int64,
        ).reshape(len(others), len(rows), 2)
        return cls(
            keys=_of_bytes([row.key for row in rows]),
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
            names=_of_bytes([row.name for row in rows]),
            left_out=_of_bytes([name for name, _ in left_out]),
            reasons=_of_bytes([reason.encode() for _, reason in left_out]),
            proof="" if proof is None else proof.hex(),
            proof_ranges=np.array(proof.ranges if proof else [], dtype=np.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all; equal indexes give equal bytes."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        arrays["format"] = np.asarray(FORMAT)
        # Text of no characters has no bytes, of which a reader cannot count how many there are.
        for name in ("others", "plan", "proof"):
            arrays[name] = arrays[name].astype("U1") if not arrays[name].itemsize else arrays[name]
        arrays["checksum"] = np.asarray(_checksum(arrays))
        with replacing(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """Read an index; None if there is none of ours (DALI's are .idx too), or a broken one."""
        try:
            arrays: dict[str, Any] = dict(arrays_of(path))
            number = int(arrays["format"])
            said = str(arrays.pop("checksum", ""))
            if number not in (2, FORMAT) or (number == FORMAT and said != _checksum(arrays)):
                return None
            if number == 2:
                rows = len(arrays["keys"])
                arrays |= {"names": np.zeros(rows, "S1"), "left_out": np.zeros(0, "S1")}
                arrays |= {"reasons": np.zeros(0, "S1"), "proof": np.asarray("")}
                arrays["proof_ranges"] = np.zeros((0, 2), np.int64)
            found: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls)}
            found["tar_bytes"] = int(found["tar_bytes"])
            found["plan"], found["proof"] = str(found["plan"]), str(found["proof"])
            index = cls(**found)
            return index if index._is_possible() else None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError):
            return None

    def _is_possible(self) -> bool:
        """Return whether types and lengths fit, and all places lie in the tar."""
        n, e, m, size = len(self.keys), len(self.others), len(self.left_out), self.tar_bytes
        whole, bytes_, text = np.int64, np.dtype("S").type, np.dtype("U").type
        expected = {
            **dict.fromkeys(("keys", "names"), (bytes_, (n,))),
            **dict.fromkeys(("offsets", "sizes", "labels"), (whole, (n,))),
            **dict.fromkeys(("heights", "widths"), (np.int32, (n,))),
            "others": (text, (e,)),
            **dict.fromkeys(("other_offsets", "other_sizes"), (whole, (e, n))),
            **dict.fromkeys(("left_out", "reasons"), (bytes_, (m,))),
            "proof_ranges": (whole, (len(self.proof_ranges), 2)),
        }
        if not n or any(
            getattr(self, name).dtype.type is not kind or getattr(self, name).shape != shape
            for name, (kind, shape) in expected.items()
        ):
            return False
        places = [(self.offsets, self.sizes, 0), (*self.proof_ranges.T, 0)]
        places.append((self.other_offsets, self.other_sizes, -1))
        return self.labels.min() >= -1 and all(
            ((begin >= least) & (count >= 0) & (count <= size) & (begin <= size - count)).all()
            for begin, count, least in places
        )

    def belongs_to(self, tar: Path) -> bool:
        """Return whether a tar is the one that this index was made of.

        Reads its headers and labels: what lies between the contents of members.

        Raises:
            OSError: if it cannot be read.
        """
        if not self.proof or tar.stat().st_size != self.tar_bytes:
            return False
        proof = Proof()
        with open(tar, "rb", buffering=0) as file:
            for offset, size in self.proof_ranges.tolist():
                proof.add(offset, os.pread(file.fileno(), size, offset))
        return proof.hex() == self.proof


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a checksum of an index's arrays: the proof is of the tar, and this is of the rows."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _of_bytes(names: Sequence[bytes]) -> np.ndarray:
    """Return an array of at least one byte each, of which numpy drops zeros at the end."""
    return np.array(list(names) or [], dtype=f"S{max([1, *map(len, names)])}")


def sidecar(tar: Path) -> Path:
    """Return the path of the index that our writer makes for a tar."""
    return tar.with_suffix(".idx")


def index_of(tar: Path) -> ShardIndex:
    """Return the index of a tar: its sidecar, the cached one, or made now and cached.

    Raises:
        DataError: if the tar is missing, no tar, cut short, or holds no images.
    """
    try:
        size = tar.stat().st_size
        name = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
        folder = cache_dir() / "index"
        ours, cached = ShardIndex.load(sidecar(tar)), folder / f"{name}.idx"
        for index, path in ((ours, sidecar(tar)), (None, cached)):
            index = ShardIndex.load(path) if path == cached else index
            if index is None or index.tar_bytes != size or not index.proof:
                continue
            seal = folder / f"{name}.seal"
            if _is_sealed(seal, tar, path) or index.belongs_to(tar):
                _seal(seal, tar, path)
                return _completed(index, ours)
    except OSError as error:
        what = "no such shard" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise DataError(f"{tar}: {what} ({error.strerror})") from None
    log.info("indexing %s (once; kept in %s)", shown(tar), folder)
    try:
        index = scan(tar)
    except DataError:
        if ours is not None and ours.tar_bytes > size:
            raise DataError(
                f"{tar} is cut short: {size} bytes, but its index {sidecar(tar).name} says"
                f" {ours.tar_bytes}; copy or write it again"
            ) from None
        raise
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index.save(cached)
        _seal(folder / f"{name}.seal", tar, cached)
    except OSError as error:  # a cache that cannot be written costs time, not the run
        log.warning("cannot save the index of %s: %s", shown(tar), error)
    return _completed(index, ours)


def _completed(index: ShardIndex, ours: ShardIndex | None) -> ShardIndex:
    """Return an index with what only our writer knows, if its own agrees with it."""
    if ours is None or ours is index:
        return index
    same = ("keys", "offsets", "sizes", "labels", "others", "other_offsets", "tar_bytes")
    if not all(np.array_equal(getattr(index, name), getattr(ours, name)) for name in same):
        return index
    known = {f.name: getattr(index, f.name) for f in fields(index)}
    known |= {name: getattr(ours, name) for name in ("heights", "widths", "plan")}
    return ShardIndex(**known)


def _identity(*paths: Path) -> str:
    """Return what changes whenever a file is written, moved or replaced."""
    found = [path.stat() for path in paths]
    return "\n".join(
        f"{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino} {s.st_dev}" for s in found
    )


def _is_sealed(seal: Path, tar: Path, index: Path) -> bool:
    """Return whether these files were found to belong together, and have not changed since."""
    try:
        if seal.read_text() != _identity(tar, index):
            return False
        changed = max(path.stat().st_ctime_ns for path in (tar, index))
        # Two writes within a tick of the clock have the same time.
        return seal.stat().st_mtime_ns > changed + _RACY
    except (OSError, ValueError):
        return False


def _seal(seal: Path, tar: Path, index: Path) -> None:
    """Note that these files belong together."""
    if _is_sealed(seal, tar, index):
        return
    try:
        seal.parent.mkdir(parents=True, exist_ok=True)
        with replacing(seal) as file:
            file.write(_identity(tar, index).encode())
    except OSError:  # it will be asked for its proof again
        return


def scan(tar: Path) -> ShardIndex:
    """Index a tar by one pass over its headers.

    Raises:
        DataError: if it is not a tar, cut short, damaged, or holds no images.
    """
    reader = TarReader(tar)
    found = gather(reader.members(), tar)
    left_out = found.left_out
    if reader.trailing:
        left_out.append((b"(end)", f"{reader.trailing} bytes after the end mark are not a tar"))
    if not found.samples:
        seen = ", ".join(f".{shown(e)}" for e in sorted(found.seen)[:5]) or "nothing"
        more = f" ({shown(left_out[0][0])} {left_out[0][1]})" if left_out else ""
        raise DataError(
            f"{tar} contains no images: found {seen}{more}; expected .jpg, .png, .webp, ..."
        )
    rows = [
        Row(sample.key, *sample.image, sample.label, others=sample.others, name=sample.name)
        for sample in found.samples
    ]
    return ShardIndex.of(rows, reader.size, left_out=left_out, proof=reader.proof)
