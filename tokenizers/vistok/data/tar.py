"""Read the headers of a tar: names, places and sizes of its members, and nothing else.

tarfile believes what headers say: it reads as many bytes of names as they announce, and goes on
from wherever they point. Here every number is held against the bytes that there are. One block is
parsed by `tarfile.TarInfo.frombuf`; links, long names and PAX records are put together here.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vistok.core.errors import DataError
from vistok.data.formats import HEAD

BLOCK = tarfile.BLOCKSIZE

LONGEST_NAME = 4096  # bytes; no file system has longer paths

_LONGEST_EXTENSION = 1 << 20  # bytes of a long name or of PAX records

_PADDING = 1 << 24  # bytes after the end mark that are looked through for another tar

_MOST_LINKS = 40  # links to links, as in Linux

_FILE, _HARD, _SYMBOLIC, _OTHER, _FOLDER = "file", "hard link", "symbolic link", "other", "folder"

_KINDS = {
    tarfile.REGTYPE: _FILE,
    tarfile.AREGTYPE: _FILE,
    tarfile.CONTTYPE: _FILE,
    tarfile.LNKTYPE: _HARD,
    tarfile.SYMTYPE: _SYMBOLIC,
    tarfile.DIRTYPE: _FOLDER,
}

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}


class Place(NamedTuple):
    """Where the bytes of a member are."""

    offset: int
    size: int


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: as it is written there, of any bytes.
        place: of its bytes; None of what has none here.
        head: its first bytes, by which an image is known.
        problem: why it has no bytes here, such as a link to nothing.
    """

    name: bytes
    place: Place | None
    head: bytes = b""
    problem: str = ""


class _Raw(NamedTuple):
    name: bytes
    kind: str
    target: bytes
    place: Place
    head: bytes


@dataclass
class Proof:
    """A checksum of all of a tar but the contents of its members: headers, padding, labels.

    Equal proofs mean equal members at equal places: so an index belongs to a tar. To make it
    again takes reading a few percent of the tar.

    Attributes:
        ranges: (offset, size) of what was read, in order.
    """

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, offset: int, data: bytes) -> None:
        """Take in the bytes at an offset."""
        self._digest.update(data)
        if self.ranges and sum(self.ranges[-1]) == offset:
            self.ranges[-1] = (self.ranges[-1][0], self.ranges[-1][1] + len(data))
        else:
            self.ranges.append((offset, len(data)))

    def hex(self) -> str:
        """Return the checksum."""
        return self._digest.hexdigest()


class _Bytes:
    """Random reads of a file, through a small window."""

    def __init__(self, descriptor: int):
        self._descriptor, self._start, self._window = descriptor, 0, b""

    def __call__(self, offset: int, size: int) -> bytes:
        start = offset - self._start
        if start < 0 or start + size > len(self._window):
            self._start, start = offset, 0
            self._window = os.pread(self._descriptor, max(size, 4096), offset)
        return self._window[start : start + size]


class TarReader:
    """One pass over the headers of a tar.

    Args:
        path: of the tar.

    Attributes:
        size: of the file.
        proof: of what was read.
        trailing: bytes after the end mark that are not a tar's; usually 0.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.proof, self.trailing = Proof(), 0

    def members(self) -> list[Member]:
        """Return all members, with links followed, in their order.

        Raises:
            DataError: if it is not a tar, cut short or damaged, or cannot be read.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        try:
            self.size = os.fstat(descriptor).st_size
            return _followed(list(self._raw(_Bytes(descriptor), descriptor)))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def _raw(self, read: _Bytes, descriptor: int) -> Iterator[_Raw]:
        place = 0
        shared: dict[bytes, bytes] = {}  # PAX records of all members that follow
        own: dict[bytes, bytes] = {}  # of the next one
        while True:
            block = read(place, BLOCK)
            if len(block) < BLOCK:
                raise self._cut() if place else self._damaged(place, "no valid tar header")
            if not block.strip(b"\0"):
                self.proof.add(place, block)
                following = self._after_end(place + BLOCK, descriptor)
                if following is None:
                    return
                place, shared, own = following, {}, {}
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                raise self._damaged(place, "no valid tar header") from None
            self.proof.add(place, block)
            content = place + BLOCK
            size = self._size(header.size, own, place)
            if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                size = 0  # whatever is said: nothing follows
            follows = content + -(-size // BLOCK) * BLOCK
            if header.type in (b"x", b"g", b"X", b"L", b"K"):
                records = self._extension(header.type, read, content, size, place)
                (shared if header.type == b"g" else own).update(records)
                place = follows
                continue
            known, own = {**shared, **own}, {}
            name = known.get(b"path", header.name.encode("utf-8", "surrogateescape"))
            target = known.get(b"linkpath", header.linkname.encode("utf-8", "surrogateescape"))
            kind = _KINDS.get(header.type, _OTHER)
            if header.type == tarfile.GNUTYPE_SPARSE or any(
                key.startswith(b"GNU.sparse.") for key in known
            ):
                kind = "sparse file"
                name = known.get(b"GNU.sparse.name", name)
                if header.type == tarfile.GNUTYPE_SPARSE:
                    content, follows = self._past_sparse_map(block, read, content, size)
            if content + size > self.size:
                raise self._cut()
            head = read(content, min(HEAD, size)) if kind == _FILE else b""
            if kind == _FILE and size <= BLOCK and name.lower().endswith(b".cls"):
                self.proof.add(content, read(content, follows - content))
            yield _Raw(name, kind, target, Place(content, size), head)
            place = follows

    def _size(self, said: int, records: dict[bytes, bytes], place: int) -> int:
        text = records.get(b"size")
        if text is not None:
            if not text.isdigit() or len(text) > 18:
                raise self._damaged(place, f"a PAX record with size={text[:20]!r}")
            said = int(text)
        if said < 0:
            raise self._damaged(place, f"a member of {said} bytes")
        return said

    def _extension(
        self, kind: bytes, read: _Bytes, content: int, size: int, place: int
    ) -> dict[bytes, bytes]:
        """Return what a header says of the member after it."""
        if size > _LONGEST_EXTENSION:
            raise self._damaged(place, f"{size} bytes of names or PAX records")
        data = read(content, -(-size // BLOCK) * BLOCK)
        if len(data) < size:
            raise self._cut()
        self.proof.add(content, data)
        data = data[:size]
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            key = b"path" if kind == tarfile.GNUTYPE_LONGNAME else b"linkpath"
            return {key: data.split(b"\0", 1)[0]}
        records, start = {}, 0
        while start < len(data):
            length, space, _ = data[start : start + 20].partition(b" ")
            end = start + int(length) if space and length.isdigit() else 0
            key, equals, value = data[start + len(length) + 1 : end].partition(b"=")
            if not equals or not start < end <= len(data) or value[-1:] != b"\n":
                raise self._damaged(place, "PAX records that make no sense")
            records[key] = value[:-1]
            start = end
        return records

    def _past_sparse_map(
        self, block: bytes, read: _Bytes, content: int, size: int
    ) -> tuple[int, int]:
        """Return where the bytes of an old GNU sparse file begin, and where the next header is."""
        more = block[482]
        while more:
            extended = read(content, BLOCK)
            if len(extended) < BLOCK:
                raise self._cut()
            self.proof.add(content, extended)
            content, more = content + BLOCK, extended[504]
        return content, content + -(-size // BLOCK) * BLOCK

    def _after_end(self, place: int, descriptor: int) -> int | None:
        """Return where another tar follows the end mark, as after `cat a.tar b.tar`."""
        start, last = place, min(self.size, place + _PADDING)
        while place < last:
            data = os.pread(descriptor, 1 << 16, place)
            if not data:
                return None
            used = len(data) - len(data.lstrip(b"\0"))
            if used == len(data):
                place += len(data)
                continue
            place = start + (place + used - start) // BLOCK * BLOCK
            try:
                tarfile.TarInfo.frombuf(os.pread(descriptor, BLOCK, place), "utf-8", "replace")
            except tarfile.HeaderError:
                self.trailing = self.size - place
                return None
            return place
        return None

    def _cut(self) -> DataError:
        return DataError(
            f"{self.path} is cut short: its {self.size} bytes end in the middle of a member or"
            " before the end mark; copy or write it again"
        )

    def _damaged(self, place: int, what: str) -> DataError:
        if place == 0 and what.startswith("no valid"):
            return DataError(f"{self.path} is not a tar file: {_what(self.path)}")
        return DataError(f"{self.path} is damaged: {what} at byte {place}; copy it again")


def _followed(raw: list[_Raw]) -> list[Member]:
    """Return members with the places of what their links lead to."""
    found: dict[bytes, Place] = {}
    links: dict[bytes, bytes] = {}
    if any(member.kind in (_HARD, _SYMBOLIC) for member in raw):
        for member in raw:
            name = posixpath.normpath(member.name)
            if member.kind == _HARD and _target(member) == name:
                continue  # the same file, named again
            links.pop(name, None)
            found.pop(name, None)  # a later member of a name takes the place of an earlier one
            if member.kind == _FILE:
                found[name] = member.place
            elif member.kind in (_HARD, _SYMBOLIC):
                links[name] = _target(member)
    heads = {member.place: member.head for member in raw if member.kind == _FILE} if links else {}
    members = []
    for member in raw:
        name, kind = member.name, member.kind
        if kind == _FOLDER:
            continue
        if len(name) > LONGEST_NAME:
            short = name[:40] + b"..."
            members.append(Member(short, None, problem=f"has a name of {len(name)} bytes"))
        elif kind == _FILE:
            members.append(Member(name, member.place, member.head))
        elif kind in (_HARD, _SYMBOLIC):
            place = _lead(_target(member), found, links)
            if place is None:
                said = member.target[:200].decode("utf-8", "backslashreplace")
                members.append(Member(name, None, problem=f"is a link to {said}, not in the tar"))
            else:
                members.append(Member(name, place, heads.get(place, b"")))
        else:
            what = "a sparse file" if kind != _OTHER else "not a regular file"
            members.append(Member(name, None, problem=f"is {what}"))
    return members


def _target(link: _Raw) -> bytes:
    if link.kind == _HARD:
        return posixpath.normpath(link.target)
    return posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.target))


def _lead(name: bytes, found: dict[bytes, Place], links: dict[bytes, bytes]) -> Place | None:
    for _ in range(_MOST_LINKS):
        if name in found:
            return found[name]
        if name not in links:
            return None
        name = links[name]
    return None


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
