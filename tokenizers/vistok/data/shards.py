"""Writing shards: tars in WebDataset's conventions, with an index next to each and a manifest.

Equal input gives equal bytes: members carry no time, user or machine. Image bytes are passed
through; nothing is encoded again. Every file appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vistok.core.errors import DataError
from vistok.core.files import replacing
from vistok.data.formats import IMAGE_EXTENSIONS
from vistok.data.index import Row, ShardIndex, sidecar
from vistok.data.names import shown
from vistok.data.tar import TarReader

_KEY = re.compile(r"[A-Za-z0-9_/-]{1,90}")

_OTHER = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")  # extensions of further members


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of one shard.

    Attributes:
        name: of the file.
        samples: how many are in it.
        bytes: size of the tar.
        sha256: of the tar.
        index_sha256: of the index, which has the keys and the sizes of all images.
        keys: the first and the last one.
        sides: pixels of the shortest and the longest side of any image; zeros if not known.
        members: extensions of what samples have in addition to image and label.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    keys: list[str]
    sides: list[int]
    members: list[str]

    @classmethod
    def of(cls, tar: Path) -> ShardInfo:
        """Read the entry off the files of a shard."""
        index = ShardIndex.load(sidecar(tar))
        if index is None:
            raise DataError(f"{sidecar(tar)}: no index next to the shard")
        sides = (index.heights, index.widths)
        return cls(
            tar.name,
            len(index),
            tar.stat().st_size,
            sha256(tar),
            sha256(sidecar(tar)),
            [shown(index.keys[i]) for i in (0, -1)],
            [int(min(map(min, sides))), int(max(map(max, sides)))],
            index.others.tolist(),
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def member_bytes(content: int) -> int:
    """Return the bytes that a member of `content` bytes takes in a tar, with header and padding."""
    return tarfile.BLOCKSIZE * (1 + -(-content // tarfile.BLOCKSIZE))


def tar_bytes(content: int) -> int:
    """Return the size of a tar whose members, headers and padding are `content` bytes."""
    return -(-(content + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


class ShardFile:
    """One shard being written: a context manager that leaves the tar and its index, or neither.

    Args:
        path: of the tar; its folder exists.
        plan: a note on what it is made from, kept in the index; lets a restart know its own.
    """

    def __init__(self, path: Path, plan: str = ""):
        self.path, self.plan = path, plan
        self.bytes = 0
        self._rows: list[Row] = []
        self._stack = ExitStack()

    def __enter__(self) -> ShardFile:
        self._file = self._stack.enter_context(replacing(self.path))
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(
        self,
        key: str,
        image: bytes,
        extension: str,
        label: int | None = None,
        size: tuple[int, int] = (0, 0),
        others: Mapping[str, bytes] | None = None,
        name: bytes = b"",
    ) -> None:
        """Append one sample: `<key>.<extension>`, with a label `<key>.cls`, and the others.

        Args:
            key: ASCII letters, digits, `_`, `-` and `/`; no dot, for the key ends at the first.
            image: the file's bytes, written as they are.
            extension: of the image, without the dot.
            label: class number.
            size: (height, width) of the image, if known.
            others: further members by their extension, such as `txt` (a caption) and `npy`.
            name: what the image was called before, of any bytes; the index keeps it.

        Raises:
            DataError: for a key or an extension that other readers would misread.
        """
        if not _KEY.fullmatch(key) or key.startswith("/"):
            raise DataError(
                f"{key!r} is not a valid key of a sample: use up to 90 of A-Z a-z 0-9 _ - /"
            )
        for other in others or ():
            if not _OTHER.fullmatch(other) or other in IMAGE_EXTENSIONS or other == "cls":
                raise DataError(
                    f"{other!r} is not a valid extension of a further member: use a-z 0-9 _ - and"
                    " dots, for example txt or clip.npy, but not that of an image"
                )
            if len(key) + 1 + len(other) > 100:
                raise DataError(f"{key}.{other}: a name in a tar has at most 100 bytes")
        offset = self._member(f"{key}.{extension.lower()}", image)
        if label is not None:
            self._member(f"{key}.cls", str(label).encode())
        number = -1 if label is None else label
        places = {
            extension: (self._member(f"{key}.{extension}", data), len(data))
            for extension, data in sorted((others or {}).items())
        }
        self._rows.append(Row(key.encode(), offset, len(image), number, *size, places, name))

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the mode 0644, no names
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        self.bytes = self._tar.offset
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._tar.offset - padded

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            try:
                self._finish()
            except BaseException as error:
                self._stack.__exit__(type(error), error, error.__traceback__)  # removes the part
                raise
        self._stack.__exit__(*exception)

    def _finish(self) -> None:
        """Complete the tar under its temporary name and put the index in place before it.

        In this order a kill leaves no tar of ours without an index, and no old tar with a new one.
        """
        if not self._rows:
            raise DataError(f"{self.path} would contain no samples")
        self._tar.close()
        self._file.flush()
        written = TarReader(Path(self._file.name))
        written.members()
        index = ShardIndex.of(self._rows, self._file.tell(), self.plan, proof=written.proof)
        self.path.unlink(missing_ok=True)
        index.save(sidecar(self.path))

    def __len__(self) -> int:
        return len(self._rows)


class ShardWriter:
    """Write any number of samples as shards `<prefix>-000000.tar`, ... of bounded size.

        with ShardWriter("sets/mine", "train") as writer:
            writer.write(jpeg_bytes, "jpg", label=3)
        write_manifest("sets/mine", {"train": writer.shards})

    Args:
        folder: made if missing.
        prefix: of the names, usually `train` or `val`.
        max_bytes: a shard is closed before it would grow beyond this (unless one sample does).
    """

    def __init__(self, folder: str | Path, prefix: str = "train", max_bytes: int = 300_000_000):
        self.folder, self.prefix, self.max_bytes = Path(folder), prefix, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[ShardInfo] = []
        self.num_samples = 0
        self._open: ShardFile | None = None

    def write(
        self,
        image: bytes,
        extension: str,
        label: int | None = None,
        key: str | None = None,
        size: tuple[int, int] = (0, 0),
        others: Mapping[str, bytes] | None = None,
    ) -> None:
        """Append one sample; see `ShardFile.add`. Without a key it is the running number."""
        grown = member_bytes(len(image)) + member_bytes(1)  # the last for a `.cls`
        grown += sum(member_bytes(len(data)) for data in (others or {}).values())
        if self._open is not None and tar_bytes(self._open.bytes + grown) > self.max_bytes:
            self.roll()
        if self._open is None:
            name = f"{self.prefix}-{len(self.shards):06d}.tar"
            self._open = ShardFile(self.folder / name).__enter__()
        name = key or f"{self.num_samples:09d}"
        self._open.add(name, image, extension, label, size, others)
        self.num_samples += 1

    def roll(self) -> None:
        """Close the current shard, if any; the next sample begins another."""
        if self._open is not None:
            shard, self._open = self._open, None
            shard.__exit__(None, None, None)
            self.shards.append(ShardInfo.of(shard.path))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self.roll()
        elif self._open is not None:
            self._open.__exit__(*exception)


def write_names(folder: Path, shards: Sequence[str]) -> Path:
    r"""Write `names.tsv`: shard, key, and what the image was called before it was packed.

    Tabs, line ends, backslashes and bytes that are not UTF-8 in names are written as Python does,
    such as `\t` and `\xe9`.

    Args:
        folder: where the shards are.
        shards: their names; their indexes know the rest.
    """
    path = folder / "names.tsv"
    with replacing(path) as file:
        file.write(b"shard\tkey\tname\n")
        for shard in shards:
            index = ShardIndex.load(sidecar(folder / shard))
            if index is None:
                raise DataError(f"{sidecar(folder / shard)}: no index next to the shard")
            for key, name in zip(index.keys.tolist(), index.names.tolist(), strict=True):
                said = shown(name.replace(b"\\", b"\\\\"))
                file.write(f"{shard}\t{shown(key)}\t{said}\n".encode())
    return path


def write_manifest(
    folder: str | Path, splits: Mapping[str, Sequence[ShardInfo]], **more: Any
) -> Path:
    """Write `manifest.json`: per split the shards with counts, bytes and checksums, and totals.

    Args:
        folder: where the shards are.
        splits: name to shards, for example `{"train": writer.shards}`.
        more: further entries, for example `classes=[...]`.
    """
    content: dict[str, Any] = {"format": "vistok-shards-1", **more, "splits": {}}
    for name, shards in splits.items():
        content["splits"][name] = {
            "samples": sum(shard.samples for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
            "shards": [asdict(shard) for shard in shards],
        }
    path = Path(folder) / "manifest.json"
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
    return path
