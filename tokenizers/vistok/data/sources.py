"""Sources of images: anything with a length that gives the bytes of its i-th image.

Random access is what makes the rest simple: order, hold-out, ranks and resume are index
arithmetic, and reading is one `pread`. Names inside a tar are never used as paths. WebDataset reads
the same shards, but as streams from their beginnings.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from vistok.core.errors import ConfigError, DataError
from vistok.data.decode import IMAGE_EXTENSIONS
from vistok.data.index import ShardIndex, index_of
from vistok.data.remote import RemoteShard, ShardCache

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
    """

    name: str
    keys: np.ndarray
    sizes: np.ndarray
    shapes: np.ndarray
    shard_sizes: np.ndarray
    classes: list[str]
    others: Sequence[str]

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
                f"{key}: no such shard {missing[0]}"
                + (f" ({len(missing)} of {len(paths)} are missing)" if len(paths) > 1 else "")
            )
        with ThreadPoolExecutor(8) as pool:
            indexes = list(pool.map(_index, paths))
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} ... {paths[-1].name}"
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
        self._ends = np.cumsum(self.shard_sizes).tolist()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        data = self._bytes(index, int(self._offsets[index]), int(self.sizes[index]))
        return self.keys[index].decode(), data, self.label(index)

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
        try:
            data = os.pread(self._file(shard), size, offset)
        except FileNotFoundError:
            raise DataError(
                f"{self.paths[shard]} has disappeared since the run began; put it back and resume"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {self.paths[shard]}: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{self.paths[shard]} became shorter while it was being read")
        return data

    def locate(self, index: int) -> str:
        """Say in which tar a sample is."""
        return self.paths[bisect_right(self._ends, index)].name

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


def _index(path: Path | RemoteShard) -> ShardIndex:
    return index_of(path) if isinstance(path, Path) else path.index()


def _places(index: ShardIndex, extension: str) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets and sizes of one kind of further members; offset -1 where there is none."""
    found = np.flatnonzero(index.others == extension)
    if not len(found):
        return np.full(len(index), -1, dtype=np.int64), np.zeros(len(index), dtype=np.int64)
    return index.other_offsets[found[0]], index.other_sizes[found[0]]


class FileSource:
    """Image files, and next to each any further files of its name (`a.jpg`, `a.txt`, `a.npy`).

    Args:
        name: what the user called them.
        root: folder that the names start from.
        names: paths of the files, within `root` or absolute; they are the keys.
        sizes: bytes of each.
        labels: class number of each, -1 for none.
        classes: names of the labels.
    """

    others: Sequence[str] = ()  # not looked for; a file has what it has

    def __init__(
        self,
        name: str,
        root: Path,
        names: Sequence[str],
        sizes: Sequence[int],
        labels: Sequence[int],
        classes: list[str],
    ):
        self.name, self.root, self.classes = name, root, classes
        self.keys = np.array([os.fsencode(name) for name in names])
        self.sizes = np.array(sizes, dtype=np.int64)
        self.shard_sizes = np.array([len(names)], dtype=np.int64)
        self.shapes = np.zeros((len(names), 2), dtype=np.int32)
        self._labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        path = self._path(index)
        return os.fsdecode(self.keys[index]), path.read_bytes(), self.label(index)

    def label(self, index: int) -> int | None:
        """Return the number of the sample's class, if it has one."""
        label = int(self._labels[index])
        return None if label < 0 else label

    def read_other(self, index: int, extension: str) -> bytes | None:
        """Return the bytes of a file next to the image; see `Source.read_other`."""
        try:
            return self._path(index).with_suffix(f".{extension}").read_bytes()
        except FileNotFoundError:
            return None

    def other_size(self, index: int, extension: str) -> int | None:
        """Return the bytes of a file next to the image; None if there is none."""
        try:
            return self._path(index).with_suffix(f".{extension}").stat().st_size
        except FileNotFoundError:
            return None

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.keys[index])

    def locate(self, index: int) -> str:
        """Say in which folder a sample is."""
        return self.name


class FolderSource(FileSource):
    """Image files anywhere under a folder, in the order of their names.

    The key is the path within the folder. If every image lies in a subfolder, the first level of
    subfolders are the classes, numbered by name.

    Args:
        folder: where to look; names that begin with a dot are left alone.
        key: the configuration key it came from, for messages.
        classes: class names to number by, such as those of the training images; None finds them.

    Raises:
        DataError: if there is no such folder, or no image in it.
    """

    def __init__(
        self, folder: str | Path, key: str = "data.train", classes: list[str] | None = None
    ):
        root = Path(folder).expanduser()
        if not root.is_dir():
            found = "is a file, not a folder" if root.exists() else "no such folder"
            hint = "; for shards use data=shards" if root.suffix == ".tar" else ""
            raise DataError(f"{key}={folder}: {found}{hint}")
        found = sorted(_images_under(root))
        if not found:
            raise DataError(
                f"{key}={folder}: no images in this folder; expected files that end in .jpg, .png,"
                " .webp, ..., in it or its subfolders"
            )
        names, sizes = zip(*found, strict=True)
        tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
        if classes is None and None not in tops:
            classes = sorted({top for top in tops if top is not None})
        numbers = {name: number for number, name in enumerate(classes or [])}
        labels = [numbers.get(top or "", -1) for top in tops]
        super().__init__(str(folder), root, names, sizes, labels, classes or [])


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

    def locate(self, index: int) -> str:
        """Say in which file of its source a sample is."""
        _, source, inside = self._at(index)
        return source.locate(inside)


def _images_under(root: Path) -> list[tuple[str, int]]:
    """Return (path within root, bytes) of all images, unordered; follow links, not in circles."""
    found, folders, seen = [], [(root, "")], set()
    while folders:
        folder, prefix = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append((Path(entry.path), f"{prefix}{entry.name}/"))
                elif entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and entry.is_file():
                    found.append((prefix + entry.name, entry.stat().st_size))
    return found


def expand_shards(
    pattern: str | Sequence[str], key: str = "data.train", cache: ShardCache | None = None
) -> list[Path | RemoteShard]:
    """Expand the shards that a user names: braces, globs, addresses, lists of these.

    Args:
        pattern: such as `train-{000000..000127}.tar`, `sets/*.tar` or `https://host/x.tar`.
        key: the configuration key, for messages.
        cache: where remote shards are kept; None for one with the default settings.

    Raises:
        ConfigError: if the braces make no sense.
        DataError: if a pattern matches nothing, or is a folder, or no address that can be read.
    """
    from webdataset.shardlists import expand_urls

    places: list[Path | RemoteShard] = []
    for text in [pattern] if isinstance(pattern, str) else pattern:
        try:
            expanded = expand_urls(os.path.expanduser(str(text)))
        except ValueError as error:
            raise ConfigError(f"{key}={text}: the braces do not match ({error})") from None
        for name in expanded:
            if name.startswith("pipe:"):
                raise DataError(f"{key}={name}: commands are not run; give the address itself")
            if "://" in name:
                places.append(RemoteShard(name, cache or ShardCache()))
                continue
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not matches:
                raise DataError(f"{key}={name}: matches no file")
            places += [Path(match) for match in matches]
    if not places:
        raise ConfigError(f"{key} is an empty list; name at least one shard")
    for path in places:
        if isinstance(path, Path) and path.is_dir():
            raise DataError(f"{key}={path} is a folder; name its shards, such as {path}/*.tar")
    return places
