"""Where the images are: anything with a length that gives the bytes of its i-th image.

Random access is what makes the rest simple: order, hold-out, ranks and resume are index
arithmetic, and reading is one `pread`. Names inside a tar are never used as paths.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from vistok.data.decode import IMAGE_EXTENSIONS
from vistok.data.index import index_of
from vistok.errors import ConfigError, DataError

_MAX_OPEN = 64  # shards kept open by one process


class Source(Protocol):
    """Images by index.

    Attributes:
        name: what the user called it, for messages.
        keys: `(N,)` bytes, the samples' names.
        sizes: `(N,)` int64, bytes of each image file.
        shard_sizes: `(S,)` int64, samples per shard, in order; their sum is N.
        classes: names of the labels, where they are known.
    """

    name: str
    keys: np.ndarray
    sizes: np.ndarray
    shard_sizes: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample.

        Raises:
            OSError: if this image cannot be read (others may).
            DataError: if the source as a whole is broken.
        """
        ...

    def locate(self, index: int) -> str:
        """Say in which file a sample is, for messages."""
        ...


class ShardSource:
    """Samples of tars, read through their indexes.

    Args:
        paths: the tars, in order.
        key: the configuration key they came from, for messages.

    Raises:
        DataError: if a shard is missing, no tar, cut short, or holds no images.
    """

    def __init__(self, paths: Sequence[Path], key: str = "data.train"):
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise DataError(
                f"{key}: no such shard {missing[0]}"
                + (f" ({len(missing)} of {len(paths)} are missing)" if len(paths) > 1 else "")
            )
        with ThreadPoolExecutor(8) as pool:
            indexes = list(pool.map(index_of, paths))
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} ... {paths[-1].name}"
        self.paths = list(paths)
        self.classes: list[str] = []
        self.keys = np.concatenate([index.keys for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        self.shard_sizes = np.array([len(index) for index in indexes], dtype=np.int64)
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._labels = np.concatenate([index.labels for index in indexes])
        self._ends = np.cumsum(self.shard_sizes)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        size = int(self.sizes[index])
        try:
            data = os.pread(self._file(shard), size, int(self._offsets[index]))
        except OSError as error:
            raise DataError(f"cannot read {self.paths[shard]}: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{self.paths[shard]} became shorter while it was being read")
        label = int(self._labels[index])
        return self.keys[index].decode(), data, None if label < 0 else label

    def locate(self, index: int) -> str:
        """Say in which tar a sample is."""
        return self.paths[int(np.searchsorted(self._ends, index, side="right"))].name

    def _file(self, shard: int) -> int:
        """File descriptor of a shard; `pread` moves no offset, so forked workers may share it."""
        if shard not in self._files:
            while len(self._files) >= _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
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


class FolderSource:
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
        self.root = Path(folder).expanduser()
        self.name = str(folder)
        if not self.root.is_dir():
            found = "is a file, not a folder" if self.root.exists() else "no such folder"
            hint = "; for shards use data=shards" if self.root.suffix == ".tar" else ""
            raise DataError(f"{key}={folder}: {found}{hint}")
        found = sorted(_images_under(self.root))
        if not found:
            raise DataError(
                f"{key}={folder}: no images in this folder; wanted files that end in .jpg, .png,"
                " .webp, ..., in it or its subfolders"
            )
        self.keys = np.array([os.fsencode(name) for name, _ in found])
        self.sizes = np.array([size for _, size in found], dtype=np.int64)
        self.shard_sizes = np.array([len(found)], dtype=np.int64)
        tops = [name.split("/", 1)[0] if "/" in name else None for name, _ in found]
        self.classes = classes or []
        if classes is None and None not in tops:
            self.classes = sorted({top for top in tops if top is not None})
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._labels = np.array([numbers.get(top or "", -1) for top in tops], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        name = os.fsdecode(self.keys[index])
        return name, (self.root / name).read_bytes(), self.label(index)

    def label(self, index: int) -> int | None:
        """Number of the sample's class."""
        label = int(self._labels[index])
        return None if label < 0 else label

    def locate(self, index: int) -> str:
        """Say in which folder a sample is."""
        return self.name


def _images_under(root: Path) -> list[tuple[str, int]]:
    """(path within root, bytes) of all images, in no order; follows links, but in no circle."""
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


def expand_shards(pattern: str | Sequence[str], key: str = "data.train") -> list[Path]:
    """Turn what a user writes for shards into paths: braces, globs, and lists of these.

    Args:
        pattern: such as `train-{000000..000127}.tar` or `sets/*.tar`.
        key: the configuration key, for messages.

    Raises:
        ConfigError: if the braces make no sense.
        DataError: if a pattern matches nothing, or is remote or a folder.
    """
    from webdataset.shardlists import expand_urls

    paths: list[Path] = []
    for text in [pattern] if isinstance(pattern, str) else pattern:
        try:
            expanded = expand_urls(os.path.expanduser(str(text)))
        except ValueError as error:
            raise ConfigError(f"{key}={text}: the braces do not match ({error})") from None
        for name in expanded:
            if "://" in name or name.startswith("pipe:"):
                raise DataError(f"{key}={name}: only local shards can be read; copy it here first")
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not matches:
                raise DataError(f"{key}={name}: matches no file")
            paths += [Path(match) for match in matches]
    if not paths:
        raise ConfigError(f"{key} is an empty list; name at least one shard")
    for path in paths:
        if path.is_dir():
            raise DataError(f"{key}={path} is a folder; name its shards, such as {path}/*.tar")
    return paths


def hold_out(source: Source, fraction: float, key: str = "data.val_fraction") -> np.ndarray:
    """Choose samples for validation by a hash of their keys: `(N,)` bool.

    The choice depends on no seed and no other sample, so it stands when images are added. At
    least one sample is chosen, and at least one left.

    Raises:
        ConfigError: if the fraction is not in (0, 1).
        DataError: if there are fewer than two samples.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"{key}={fraction} must be above 0 and below 1 while data.val is not set")
    if len(source) < 2:
        raise DataError(
            f"{source.name} holds one image; training and validation need two (or set data.val)"
        )
    digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in source.keys)
    hashes = np.frombuffer(digests, dtype="<u8")
    chosen = hashes < np.uint64(fraction * 2**64)
    if not chosen.any():
        chosen[np.argmin(hashes)] = True
    if chosen.all():
        chosen[np.argmax(hashes)] = False
    return chosen


def fingerprint(source: Source) -> str:
    """Identity of a source's samples and their order; where it lies does not matter."""
    digest = hashlib.sha256()
    for part in (source.shard_sizes, source.sizes, source.keys):
        digest.update(f"{part.dtype} {len(part)} ".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
