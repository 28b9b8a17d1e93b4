"""Sources of single files: folders, and lists of files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vistok.core.errors import DataError
from vistok.data.decode import DecodeError
from vistok.data.formats import HEAD, IMAGE_EXTENSIONS, OTHER_EXTENSIONS, sniffed
from vistok.data.names import key_text, shown


class FileSource:
    """Image files, and next to each any further files of its name (`a.jpg`, `a.txt`, `a.npy`).

    Args:
        name: what the user called them.
        root: folder that the names start from.
        names: paths of the files, within `root` or absolute; they are the keys.
        sizes: bytes of each.
        labels: class number of each, -1 for none.
        classes: names of the labels.
        left_out: names of images that are there and cannot be used, and why.
    """

    most_bytes = 1 << 31  # of a file; the pixels of what is larger are not looked at
    others: Sequence[str] = ()  # not looked for; a file has what it has

    def __init__(
        self,
        name: str,
        root: Path,
        names: Sequence[str],
        sizes: Sequence[int],
        labels: Sequence[int],
        classes: list[str],
        left_out: Sequence[tuple[str, str]] = (),
    ):
        self.name, self.root, self.classes = shown(name), root, classes
        self.left_out = list(left_out)
        self.keys = np.array([os.fsencode(name) for name in names])
        self.sizes = np.array(sizes, dtype=np.int64)
        self.shard_sizes = np.array([len(names)], dtype=np.int64)
        self.shapes = np.zeros((len(names), 2), dtype=np.int32)
        self._labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[str, bytes, int | None]:
        """Return key, image bytes and label of a sample; see `Source.read`."""
        key = bytes(self.keys[index])
        return key_text(key), read_file(self._path(index), self.most_bytes), self.label(index)

    def label(self, index: int) -> int | None:
        """Return the number of the sample's class, if it has one."""
        label = int(self._labels[index])
        return None if label < 0 else label

    def read_other(self, index: int, extension: str) -> bytes | None:
        """Return the bytes of a file next to the image; see `Source.read_other`."""
        try:
            return read_file(self._path(index).with_suffix(f".{extension}"), self.most_bytes)
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

    def original(self, index: int) -> bytes:
        """Return the name of a sample's file."""
        return bytes(self.keys[index])

    def locate(self, index: int) -> str:
        """Say in which folder a sample is."""
        return self.name


class FolderSource(FileSource):
    """Image files anywhere under a folder, in the order of their names.

    The key is the path within the folder. If every image lies in a subfolder, the first level of
    subfolders are the classes, numbered by name. Files are images by their extension, or if they
    have none that is known, by their first bytes.

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
        root = Path(os.path.expanduser(folder))
        if not root.is_dir():
            found = "is a file, not a folder" if root.exists() else "no such folder"
            hint = "; for shards use data=shards" if root.suffix == ".tar" else ""
            raise DataError(f"{key}={shown(str(folder))}: {found}{hint}")
        images, left_out = images_under(root)
        found = sorted(images)
        if not found:
            if left_out:
                more = f": {left_out[0][0]} {left_out[0][1]}"
                more += f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
                raise DataError(f"{key}={shown(str(folder))}: no image in it can be used{more}")
            raise DataError(
                f"{key}={shown(str(folder))}: no images in this folder; expected files that end in"
                " .jpg, .png, .webp, ..., in it or its subfolders"
            )
        names, sizes = zip(*found, strict=True)
        tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
        if classes is None and None not in tops:
            classes = sorted({top for top in tops if top is not None})
        numbers = {name: number for number, name in enumerate(classes or [])}
        labels = [numbers.get(top or "", -1) for top in tops]
        super().__init__(str(folder), root, names, sizes, labels, classes or [], left_out)


def read_file(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: if it cannot be read; a pipe, which would wait for ever, cannot.
        DecodeError: if it is larger than `most_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > most_bytes:
            raise DecodeError(f"is a file of {status.st_size} bytes", "too large")
        return file.read()


def images_under(root: Path) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
    """Look through a folder, follow links, not in circles.

    Returns:
        (path within root, bytes) of all images, unordered; and (name, reason) of what seems to be
        an image or a folder of them, and cannot be used.
    """
    found, left_out, folders, seen = [], [], [(root, "")], set()
    while folders:
        folder, prefix = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            left_out.append((shown(prefix or str(root)), f"cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            try:
                if entry.is_dir():
                    folders.append((Path(entry.path), f"{name}/"))
                elif (problem := _problem(entry)) is None:
                    found.append((name, entry.stat().st_size))
                elif problem:
                    left_out.append((shown(name), problem))
            except OSError as error:  # such as links in a circle
                left_out.append((shown(name), f"cannot be read: {error.strerror}"))
    return found, sorted(left_out)


def _problem(entry: os.DirEntry[str]) -> str | None:
    """Return None for an image, "" for something else, and why it cannot be used."""
    extension = entry.name.rpartition(".")[2].lower() if "." in entry.name else ""
    is_image = extension in IMAGE_EXTENSIONS
    if not is_image and extension in OTHER_EXTENSIONS:
        return ""
    if not entry.is_file():
        if not is_image and not entry.is_symlink():
            return ""
        return "is a link to nothing" if entry.is_symlink() else "is not a regular file"
    if not is_image:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            is_image = bool(sniffed(os.read(descriptor, HEAD)))
        finally:
            os.close(descriptor)
    return None if is_image else ""
