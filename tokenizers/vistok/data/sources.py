"""Sources of images: anything with a length that gives the bytes of its i-th image.

Random access is what makes the rest simple: order, hold-out, ranks and resume are index
arithmetic, and reading is one `pread`. Names inside a tar are never used as paths. WebDataset reads
the same shards, but as streams from their beginnings.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from vistok.core.errors import DataError
from vistok.data.formats import IMAGE_EXTENSIONS
from vistok.data.index import ShardIndex, index_of
from vistok.data.names import key_text, shown
from vistok.data.remote import RemoteShard

_MAX_OPEN = 64  # shards kept open by one process


class Source(Protocol):
    """Images by index.

    Attributes:
        name: what the user called it, for messages.
        keys: `(N,)` bytes, the samples' names.
        sizes: `(N,)` int64, bytes of each image file.
        shapes: `(N, 2)` int32, height and width of each; zeros where they are not known.
        shard_sizes: `(S,)` int64, samples per shard, in order; their sum is N.
        others: extensions of further members, where they are known beforehand.
        classes: names of the labels, where they are known.
        left_out: names of images and labels that are there and cannot be used, and why.
    """

    name: str
    keys: np.ndarray
    sizes: np.ndarray
    shapes: np.ndarray
    shard_sizes: np.ndarray
    classes: list[str]
    others: Sequence[str]
    left_out: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample.

        Raises:
            OSError: if this image cannot be read (others may).
            DataError: if the source as a whole is broken.
        """
        ...

    def label(self, index: int) -> int | None:
        """Return the number of the sample's class, if it has one."""
        ...

    def read_other(self, index: int, extension: str) -> bytes | None:
        """Return a further member of a sample (a caption, an embedding); None if it has none.

        Raises:
            OSError, DataError: as `read`.
        """
        ...

    def other_size(self, index: int, extension: str) -> int | None:
        """Return the size of what `read_other` would return, without reading it."""
        ...

    def original(self, index: int) -> bytes:
        """Return what a sample's image was called before it was packed, as far as is known."""
        ...

    def locate(self, index: int) -> str:
        """Say in which file a sample is, for messages."""
        ...


class ShardSource:
    """Samples of tars, read through their indexes.

    Args:
        paths: the tars, in order, here or elsewhere.
        key: the configuration key they came from, for messages.
        others: extensions of further members that will be read; None for all there are. The
            places of those not named are not kept in memory.

    Attributes:
        others: the extensions of all further members that there are, named or not.
        further_images: images that come after the first one of a sample, by extension: how many.

    Raises:
        DataError: if a shard is missing, no tar, cut short, or holds no images.
    """

    def __init__(
        self,
        paths: Sequence[Path | RemoteShard],
        key: str = "data.train",
        others: Sequence[str] | None = (),
    ):
        missing = [path for path in paths if isinstance(path, Path) and not path.exists()]
        if missing:
            raise DataError(
                f"{key}: no such shard {shown(missing[0])}"
                + (f" ({len(missing)} of {len(paths)} are missing)" if len(paths) > 1 else "")
            )
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(_index, paths))
        indexes = [index for index, _ in found]
        self._stamps = [stamp for _, stamp in found]
        first, last = shown(str(paths[0])), shown(paths[-1].name)
        self.name = first if len(paths) == 1 else f"{first} ... {last}"
        self.paths = list(paths)
        self.classes: list[str] = []
        self.keys = np.concatenate([index.keys for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        self.shard_sizes = np.array([len(index) for index in indexes], dtype=np.int64)
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._labels = np.concatenate([index.labels for index in indexes])
        self.shapes = np.concatenate([np.stack((i.heights, i.widths), 1) for i in indexes])
        self.others: Sequence[str] = sorted(
            {str(name) for index in indexes for name in index.others}
        )
        self._others = {
            extension: tuple(np.concatenate(part) for part in zip(*places, strict=True))
            for extension in self.others
            if others is None or extension in others
            if (places := [_places(index, extension) for index in indexes])
        }
        self._names = [index.names for index in indexes]
        self.left_out = [
            (f"{shown(path.name)}: {shown(name)}", key_text(reason))
            for path, index in zip(paths, indexes, strict=True)
            for name, reason in zip(index.left_out.tolist(), index.reasons.tolist(), strict=True)
        ]
        self.further_images = _further_images(indexes)
        self._ends = np.cumsum(self.shard_sizes).tolist()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        data = self._bytes(index, int(self._offsets[index]), int(self.sizes[index]))
        return key_text(self.keys[index]), data, self.label(index)

    def label(self, index: int) -> int | None:
        """Return the number of the sample's class, if it has one."""
        label = int(self._labels[index])
        return None if label < 0 else label

    def read_other(self, index: int, extension: str) -> bytes | None:
        """Return a further member of a sample; see `Source.read_other`."""
        size = self.other_size(index, extension)
        if size is None:
            return None
        return self._bytes(index, int(self._others[extension][0][index]), size)

    def other_size(self, index: int, extension: str) -> int | None:
        """Return the bytes of a further member; None if the sample has none."""
        if extension not in self._others or self._others[extension][0][index] < 0:
            return None
        return int(self._others[extension][1][index])

    def _bytes(self, index: int, offset: int, size: int) -> bytes:
        shard = bisect_right(self._ends, index)
        path = shown(str(self.paths[shard]))
        try:
            descriptor = self._file(shard)
            if self._stamps[shard] not in (None, _stamp(os.fstat(descriptor))):
                self._check_changed(shard, descriptor)
            data = os.pread(descriptor, size, offset)
        except FileNotFoundError:
            raise DataError(
                f"{path} has disappeared since the run began; put it back and resume"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{path} became shorter while it was being read")
        return data

    def _check_changed(self, shard: int, descriptor: int) -> None:
        """Raise if a shard that was written since it was indexed holds other samples now."""
        path, now = self.paths[shard], os.fstat(descriptor)
        stamp = self._stamps[shard]
        assert isinstance(path, Path) and stamp is not None
        if now.st_size < stamp[0]:
            raise DataError(f"{shown(path)} became shorter while it was being read")
        index = index_of(path)
        part = slice(self._ends[shard] - int(self.shard_sizes[shard]), self._ends[shard])
        mine = (self.keys, self._offsets, self.sizes, self._labels)
        theirs = (index.keys, index.offsets, index.sizes, index.labels)
        if not all(np.array_equal(a[part], b) for a, b in zip(mine, theirs, strict=True)):
            raise DataError(
                f"{shown(path)} was written anew while it was being read, and holds other samples"
                " now; restore it and resume, or start a new run"
            )
        self._stamps[shard] = _stamp(now)

    def original(self, index: int) -> bytes:
        """Return what a sample's image was called before it was packed; its key if unknown."""
        shard = bisect_right(self._ends, index)
        inside = index - self._ends[shard] + int(self.shard_sizes[shard])
        return bytes(self._names[shard][inside]) or bytes(self.keys[index])

    def locate(self, index: int) -> str:
        """Say in which tar a sample is."""
        return shown(self.paths[bisect_right(self._ends, index)].name)

    def _file(self, shard: int) -> int:
        """Return a file descriptor of a shard, which forked workers may share (`pread`)."""
        if shard not in self._files:
            while len(self._files) >= _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            path = self.paths[shard]
            opened = os.open(path, os.O_RDONLY) if isinstance(path, Path) else path.open()
            self._files[shard] = opened
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors end with their process


def _index(path: Path | RemoteShard) -> tuple[ShardIndex, tuple[int, int] | None]:
    """Return the index of a shard, and what changes when it is written; None for remote ones."""
    if not isinstance(path, Path):
        return path.index(), None
    try:
        stamp = _stamp(path.stat())  # before: a write in between shows when it is read
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    return index_of(path), stamp


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _further_images(indexes: Sequence[ShardIndex]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for index in indexes:
        for extension, offsets in zip(index.others.tolist(), index.other_offsets, strict=True):
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                counts[extension] = counts.get(extension, 0) + int((offsets >= 0).sum())
    return counts


def _places(index: ShardIndex, extension: str) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and sizes of one kind of further members; offset -1 where there is none."""
    found = np.flatnonzero(index.others == extension)
    if not len(found):
        return np.full(len(index), -1, dtype=np.int64), np.zeros(len(index), dtype=np.int64)
    return index.other_offsets[found[0]], index.other_sizes[found[0]]


class MixedSource:
    """Several sources as one; keys begin with the name of theirs.

    Args:
        sources: by name, in order. Labels stay what they are in each.
    """

    def __init__(self, sources: Mapping[str, Source]):
        self.sources = dict(sources)
        self.name = " + ".join(sources)
        self.classes: list[str] = []
        parts = list(sources.values())
        self.keys = np.concatenate(
            [np.char.add(f"{name}/".encode(), part.keys) for name, part in sources.items()]
        )
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.shapes = np.concatenate([part.shapes for part in parts])
        self.shard_sizes = np.concatenate([part.shard_sizes for part in parts])
        self.others: Sequence[str] = sorted({other for part in parts for other in part.others})
        self.left_out = [
            (f"{name}: {left}", reason)
            for name, part in sources.items()
            for left, reason in part.left_out
        ]
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return len(self.keys)

    def _at(self, index: int) -> tuple[str, Source, int]:
        number = bisect_right(self._ends, index)
        name, source = list(self.sources.items())[number]
        return name, source, index - self._ends[number] + len(source)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        name, source, inside = self._at(index)
        key, data, label = source.read(inside)
        return f"{name}/{key}", data, label

    def label(self, index: int) -> int | None:
        """Return the number of the sample's class in its own source, if it has one."""
        _, source, inside = self._at(index)
        return source.label(inside)

    def read_other(self, index: int, extension: str) -> bytes | None:
        """Return a further member of a sample; see `Source.read_other`."""
        _, source, inside = self._at(index)
        return source.read_other(inside, extension)

    def other_size(self, index: int, extension: str) -> int | None:
        """Return the bytes of a further member; None if the sample has none."""
        _, source, inside = self._at(index)
        return source.other_size(inside, extension)

    def original(self, index: int) -> bytes:
        """Return what a sample's image was called before it was packed, as far as is known."""
        name, source, inside = self._at(index)
        return f"{name}/".encode() + source.original(inside)

    def locate(self, index: int) -> str:
        """Say in which file of its source a sample is."""
        _, source, inside = self._at(index)
        return source.locate(inside)
