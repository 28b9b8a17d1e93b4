"""Which members of a tar make a sample, in tars of any layout.

As WebDataset has it, members of one name up to the first dot are a sample: `a.jpg`, `a.cls`,
`a.seg.png`. Tars that were not written for it have `b 2.0.jpg` and `2021.05.01.jpg`: where no
member ends in an image's extension right after the first dot, each image is a sample of its own,
whose name goes up to its last dot. Members need not be adjacent. Whatever is an image or a label
and ends up in no sample is named, with the reason.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vistok.core.errors import DataError
from vistok.data.formats import IMAGE_EXTENSIONS, OTHER_EXTENSIONS, USUAL_EXTENSIONS, sniffed
from vistok.data.tar import Member, Place

# The key ends at the first dot of the file name, and keeps the folder.
_MEMBER = re.compile(rb"((?:.*/|)[^./][^./]*)(?:[.]([^/]*))?", re.DOTALL)

_LONGEST_LABEL = 20  # bytes

_LABEL = re.compile(rb"\s*(-?\d{1,18})\s*")


@dataclass
class Sample:
    """One image, and what belongs to it."""

    key: bytes
    name: bytes
    image: Place
    label: int = -1
    others: dict[str, Place] = field(default_factory=dict)


@dataclass
class Gathered:
    """Samples in the order of their images; members left out, and why; all extensions."""

    samples: list[Sample]
    left_out: list[tuple[bytes, str]]
    seen: set[bytes]


@dataclass
class _Part:
    """Adjacent members of one key: their extensions, and which are images."""

    key: bytes
    number: int
    members: dict[bytes, tuple[int, Member]] = field(default_factory=dict)
    images: dict[bytes, int] = field(default_factory=dict)  # extension to how usual it is

    def image(self) -> bytes | None:
        """Return the extension of the part's image: one without a dot, a usual one if it can be."""
        plain = [e for e in self.images if b"." not in e]
        return min(plain, key=lambda e: (self.images[e], self.members[e][0]), default=None)


def gather(members: Iterable[Member], tar: Path) -> Gathered:
    """Make samples of a tar's members.

    Args:
        members: in the tar's order.
        tar: that labels are read from.

    Raises:
        DataError: if a label cannot be read.
    """
    result = Gathered([], [], set())
    parts = _parts(members, result)
    whole: dict[bytes, list[tuple[_Part, bytes]]] = defaultdict(list)
    for part in parts:
        if (extension := part.image()) is not None:
            whole[part.key].append((part, extension))
    made: list[tuple[int, Sample, dict[bytes, Member]]] = []
    hosts: dict[bytes, list[dict[bytes, Member]]] = defaultdict(list)  # by key
    for key, group in whole.items():
        for part, extension in group:
            number, image = part.members[extension]
            further = {e: m for e, (_, m) in part.members.items() if e != extension}
            assert image.place is not None
            made.append((number, Sample(key, image.name, image.place), further))
            hosts[key].append(further)
    loose = [part for part in parts if part.image() is None]
    for part in loose:
        if part.key in whole:
            continue
        for extension in part.images:  # b 2.0.jpg
            number, image = part.members[extension]
            stem, further = image.name.rpartition(b".")[0], {}
            assert image.place is not None
            made.append((number, Sample(stem, image.name, image.place), further))
            hosts[stem].append(further)
            if stem != part.key:
                hosts[part.key].append(further)
    for part in loose:
        for extension, (_, member) in part.members.items():
            if part.key in whole:
                _give(member, extension, part.key, hosts, result, extension in part.images)
            elif extension not in part.images:
                stem, _, last = member.name.rpartition(b".")
                if stem in hosts and stem != part.key:
                    _give(member, last.lower(), stem, hosts, result)
                else:
                    _share(member, extension, part.key, hosts, result)
    made.sort(key=lambda item: item[0])
    _label(made, tar, result)
    result.samples = [sample for _, sample, _ in made]
    return result


def _parts(members: Iterable[Member], result: Gathered) -> list[_Part]:
    """Return runs of members of one key, none of which has an extension twice."""
    parts: list[_Part] = []
    part: _Part | None = None
    for number, member in enumerate(members):
        match = _MEMBER.fullmatch(member.name)
        last = member.name.rpartition(b"/")[2].rpartition(b".")[2].lower()
        named = last.decode("ascii", "replace")
        is_image = named in IMAGE_EXTENSIONS
        if member.problem:
            if is_image or named == "cls" or (match and not match[2]):
                result.left_out.append((member.name, member.problem))
            continue
        if not is_image and (not match or named not in OTHER_EXTENSIONS):
            is_image = bool(sniffed(member.head))
        if not match:
            if is_image or named == "cls":
                # Such as ._a.jpg, in which macOS keeps what its file system knows of a.jpg.
                result.left_out.append((member.name, "has a name that begins with a dot"))
            continue
        key, extension = match[1], (match[2] or b"").lower()
        if part is None or key != part.key or extension in part.members:
            part = _Part(key, number)
            parts.append(part)
        part.members[extension] = number, member
        result.seen.add(extension)
        if is_image:
            usual = 0 if named in USUAL_EXTENSIONS else 1 if named in IMAGE_EXTENSIONS else 2
            part.images[extension] = usual
    return parts


def _give(
    member: Member,
    extension: bytes,
    key: bytes,
    hosts: dict[bytes, list[dict[bytes, Member]]],
    result: Gathered,
    is_image: bool = False,
) -> None:
    """Give a member that stands alone to the first sample of its key that has none of its kind."""
    for further in hosts[key]:
        if extension not in further:
            further[extension] = member
            return
    if is_image or extension == b"cls":
        result.left_out.append((member.name, "belongs to a sample that has one"))


def _share(
    member: Member,
    extension: bytes,
    key: bytes,
    hosts: dict[bytes, list[dict[bytes, Member]]],
    result: Gathered,
) -> None:
    """Give a member to all samples of its key: s.cls belongs to s.left.jpg and s.right.jpg."""
    for further in hosts.get(key, []):
        further.setdefault(extension, member)
    if key not in hosts and extension == b"cls":
        result.left_out.append((member.name, "is a label without an image"))


def _label(
    made: list[tuple[int, Sample, dict[bytes, Member]]], tar: Path, result: Gathered
) -> None:
    """Read the labels, and put down the places of all further members."""
    descriptor = os.open(tar, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for _, sample, further in made:
            for extension, member in further.items():
                assert member.place is not None
                if extension == b"cls" and member.place.size <= _LONGEST_LABEL:
                    text = os.pread(descriptor, member.place.size, member.place.offset)
                    if (match := _LABEL.fullmatch(text)) and int(match[1]) >= -1:
                        sample.label = int(match[1])
                        continue
                    said = text.decode("utf-8", "backslashreplace")
                    result.left_out.append((member.name, f"is a label but not a number: {said!r}"))
                elif extension == b"cls":
                    reason = f"is a label of {member.place.size} bytes, not a number"
                    result.left_out.append((member.name, reason))
                else:
                    sample.others[extension.decode("utf-8", "backslashreplace")] = member.place
    except OSError as error:
        raise DataError(f"{tar}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
