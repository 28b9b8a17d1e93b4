"""The contract of a layout of tokens, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import DataError
from vistok.data.token_shards import ShardArrays
from vistok.data.tokens import TokenFolder, TokenSample, smallest_dtype

#: Tokens around the codes of an image, in the layouts that are one stream of ids.
DOCUMENT = ("begin_of_image", "class", "end_of_image")


@dataclass(frozen=True)
class Alphabet:
    """The joint vocabulary of a folder of tokens.

    Attributes:
        sizes: of the Q streams.
        special: id of each special token.
        first_class: id of the token of class 0.
        size: of the whole vocabulary.
        document: which of `DOCUMENT` an image gets.
    """

    sizes: tuple[int, ...]
    special: dict[str, int]
    first_class: int
    size: int
    document: tuple[str, ...]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Alphabet:
        """Return that of a manifest, or of the values that one is made of."""
        return cls(
            tuple(stream["size"] for stream in values["streams"]),
            dict(values["special"]),
            int(values["classes"]["first"]),
            int(values["vocabulary_size"]),
            tuple(values["document"]),
        )

    @property
    def offsets(self) -> np.ndarray:
        """Return `(Q,)` int64, the first id of each stream."""
        return np.cumsum([0, *self.sizes[:-1]])

    @property
    def num_codes(self) -> int:
        """Return the number of codes of all streams."""
        return sum(self.sizes)

    def join(self, ids: np.ndarray) -> np.ndarray:
        """Return `(n * Q,)` ids of the joint vocabulary, token by token, of `(n, Q)`."""
        return (np.asarray(ids, dtype=np.int64) + self.offsets).reshape(-1)

    def split(self, joint: np.ndarray, where: str) -> np.ndarray:
        """Return `(n, Q)` ids of `(n * Q,)` joint ones.

        Raises:
            DataError: if they are not codes in the order of the streams.
        """
        if len(joint) % len(self.sizes):
            raise DataError(f"{where}: {len(joint)} ids are not whole tokens of {len(self.sizes)}")
        ids = np.asarray(joint, dtype=np.int64).reshape(-1, len(self.sizes)) - self.offsets
        wrong = (ids < 0) | (ids >= np.array(self.sizes))
        if wrong.any():
            row, stream = np.argwhere(wrong)[0]
            found, first = int(ids[row, stream] + self.offsets[stream]), int(self.offsets[stream])
            raise DataError(
                f"{where}: token {row}: found id {found}, valid in stream {stream} are {first} to "
                f"{first + self.sizes[stream] - 1}"
            )
        return ids

    def around(self, label: int) -> tuple[list[int], list[int]]:
        """Return the ids before and behind the codes of an image of a class, -1 for none."""
        before = []
        if "begin_of_image" in self.document:
            before.append(self.special["begin_of_image"])
        if "class" in self.document:
            known = self.first_class + label
            before.append(self.special["unconditional"] if label < 0 else known)
        behind = [self.special["end_of_image"]] if "end_of_image" in self.document else []
        return before, behind

    def write_document(self, ids: np.ndarray, label: int, dtype: np.dtype) -> np.ndarray:
        """Return the stream of one image: its codes, with the tokens around them."""
        before, behind = self.around(label)
        return np.concatenate([before, self.join(ids), behind]).astype(dtype)

    def read_document(self, stream: np.ndarray, where: str) -> TokenSample:
        """Return the image of a stream."""
        stream = np.asarray(stream, dtype=np.int64)
        label = None
        begin, end = 0, len(stream)
        for name in self.document:
            place = end - 1 if name == "end_of_image" else begin
            found = int(stream[place]) if begin < end else -1
            if name == "class":
                right = self.first_class <= found < self.size
                label = found - self.first_class if right else None
                right = right or found == self.special["unconditional"]
            else:
                right = found == self.special[name]
            if not right:
                raise DataError(f"{where}: expected the token {name}, found id {found}")
            begin, end = (begin, end - 1) if name == "end_of_image" else (begin + 1, end)
        return TokenSample(self.split(stream[begin:end], where), label, None, "")


class Layout(ABC):
    """One layout.

    Attributes:
        name: as `format=` has it; the name of its folder, too.
        per_shard: it has files of its own for each shard, written along with it; else it is one
            for the whole set, made when all shards are there.
    """

    name: str
    per_shard = False

    def check(self, alphabet: Alphabet) -> None:  # noqa: B027 (most hold any vocabulary)
        """Raise a ConfigError if the layout cannot hold the vocabulary."""

    def file_of(self, folder: Path, shard: str) -> Path:
        """Return the file of a shard, for layouts with `per_shard`.

        Args:
            folder: of the layout.
            shard: name of the shard, without ending.
        """
        raise NotImplementedError

    def write_shard(self, path: Path, shard: ShardArrays, alphabet: Alphabet) -> None:
        """Write the file of a shard, whole or not at all."""
        raise NotImplementedError

    def write(self, folder: Path, tokens: TokenFolder) -> None:
        """Write the files for the whole set, each whole or not at all."""
        raise NotImplementedError

    @abstractmethod
    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples; label, caption, key and view where the layout has them.

        Args:
            folder: of the layout.
            manifest: of the folder of tokens.

        Raises:
            DataError: if a file is missing or damaged, or an id is out of range.
        """


def shards_of(tokens: TokenFolder) -> Iterator[ShardArrays]:
    """Yield the shards of a folder, in order; one is open at a time."""
    for number in range(len(tokens.manifest["shards"])):
        yield tokens.shard(number)
        tokens.close(number)


def documents(shard: ShardArrays, alphabet: Alphabet, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the stream of each sample of a shard."""
    for row in range(len(shard)):
        yield alphabet.write_document(shard.tokens(row), int(shard.labels[row]), dtype)


def stream_dtype(alphabet: Alphabet) -> np.dtype:
    """Return the smallest type that holds every id that a document may have."""
    largest = alphabet.size if "class" in alphabet.document else alphabet.first_class
    return smallest_dtype(largest - 1)


def needed(path: Path, wanted: str) -> Path:
    """Return `path`, which is there.

    Raises:
        DataError: if it is not.
    """
    if not path.exists():
        raise DataError(f"{path}: missing; {wanted}")
    return path


def rising(path: Path, ends: Sequence[int] | np.ndarray, last: int) -> np.ndarray:
    """Return places in a file as int64, which must rise from 0 to `last`.

    Raises:
        DataError: if they don't.
    """
    values = np.asarray(ends, dtype=np.int64)
    if not len(values) or values[0] != 0 or values[-1] != last or (np.diff(values) < 0).any():
        raise DataError(f"{path}: damaged: its places must rise from 0 to {last}")
    return values
