"""Megatron-LM's indexed data set: `tokens.bin` and `tokens.idx`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import ConfigError, DataError
from vistok.core.files import replacing
from vistok.data.tokens import TokenFolder, TokenSample
from vistok.export.formats.base import (
    Alphabet,
    Layout,
    documents,
    needed,
    rising,
    shards_of,
    stream_dtype,
)

_MAGIC = b"MMIDIDX\0\0"

#: Codes of the types; there is none of 32 bits without a sign.
_CODES = {"uint8": 1, "uint16": 8, "int32": 4}

_HEADER = struct.Struct("<9sQBQQ")


class Megatron(Layout):
    """One document for each sample, of one sequence: its codes between the special tokens.

    `.idx` is written last: Megatron takes a prefix for a data set when it is there.
    """

    name = "megatron"

    def check(self, alphabet: Alphabet) -> None:
        """Raise if ids need 32 bits and no sign."""
        if alphabet.size > 2**31:
            raise ConfigError(
                f"format=megatron: holds ids up to {2**31 - 1}, and this vocabulary has "
                f"{alphabet.size}; leave it out"
            )

    def write(self, folder: Path, tokens: TokenFolder) -> None:
        """Write both files."""
        alphabet = Alphabet.of(tokens.manifest)
        dtype = stream_dtype(alphabet)
        dtype = np.dtype("int32") if dtype.name == "uint32" else dtype
        (folder / "tokens.idx").unlink(missing_ok=True)
        lengths: list[int] = []
        with replacing(folder / "tokens.bin") as file:
            for shard in shards_of(tokens):
                for document in documents(shard, alphabet, dtype):
                    file.write(document.tobytes())
                    lengths.append(len(document))
        ends = np.cumsum(lengths, dtype=np.int64)
        count = len(lengths)
        with replacing(folder / "tokens.idx") as file:
            file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype.name], count, count + 1))
            file.write(np.array(lengths, dtype="<i4").tobytes())
            file.write(((ends - lengths) * dtype.itemsize).astype("<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())

    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples, with their labels if documents have classes."""
        alphabet = Alphabet.of(manifest)
        path, data = folder / "tokens.idx", folder / "tokens.bin"
        head = needed(path, "it says where documents begin").read_bytes()
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise DataError(f"{path}: not an index of Megatron; it must begin with MMIDIDX")
        _, version, code, count, documents_ = _HEADER.unpack_from(head)
        kinds = {number: name for name, number in _CODES.items()}
        if version != 1 or code not in kinds:
            raise DataError(f"{path}: version {version} and type {code}: expected 1 and 1, 4 or 8")
        if len(head) != _HEADER.size + 12 * count + 8 * documents_:
            raise DataError(f"{path}: {len(head)} bytes are not those of {count} sequences")
        lengths = np.frombuffer(head, "<i4", count, _HEADER.size)
        places = np.frombuffer(head, "<i8", count, _HEADER.size + 4 * count)
        kind = np.dtype(kinds[code]).newbyteorder("<")
        needed(data, "its index is there")
        ids = np.memmap(data, kind, "r") if count else np.zeros(0, kind)
        ends = rising(path, [*(places // kind.itemsize), len(ids)] if count else [0], len(ids))
        for number in range(count):
            if ends[number] + lengths[number] != ends[number + 1]:
                raise DataError(f"{path}: sequence {number} does not end where the next begins")
            part = ids[ends[number] : ends[number + 1]]
            yield alphabet.read_document(part, f"{data}: sequence {number}")
