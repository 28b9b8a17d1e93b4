"""Flat streams of ids: torchtitan's pretokenized data, and nanoGPT's memmap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import ConfigError, DataError
from vistok.core.files import replacing
from vistok.data.tokens import TokenFolder, TokenSample
from vistok.export.formats.base import Alphabet, Layout, documents, needed, rising, shards_of


def _write_stream(path: Path, tokens: TokenFolder, dtype: np.dtype) -> np.ndarray:
    """Write all documents one behind the other; return where they begin, and the end."""
    alphabet = Alphabet.of(tokens.manifest)
    ends = [0]
    with replacing(path) as file:
        for shard in shards_of(tokens):
            for document in documents(shard, alphabet, dtype):
                file.write(document.tobytes())
                ends.append(ends[-1] + len(document))
    return np.array(ends, dtype=np.int64)


def _read_stream(
    path: Path, offsets: Path, kind: str, manifest: dict[str, Any]
) -> Iterator[TokenSample]:
    alphabet = Alphabet.of(manifest)
    size = needed(path, "it has the ids").stat().st_size
    if size % np.dtype(kind).itemsize:
        raise DataError(f"{path}: {size} bytes are not whole ids of {kind}")
    ids = np.memmap(path, kind, "r") if size else np.zeros(0, kind)
    try:
        found = np.load(needed(offsets, "it says where images begin"), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{offsets}: not readable ({error})") from None
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{offsets}: expected one row of whole numbers")
    if len(found) and found[-1] != len(ids):  # torchtitan's has the beginnings alone
        found = np.append(found, len(ids))
    ends = rising(offsets, found, len(ids))
    for number in range(len(ends) - 1):
        yield alphabet.read_document(
            ids[ends[number] : ends[number + 1]], f"{path}: document {number}"
        )


class Torchtitan(Layout):
    """`tokens.bin`, uint32, and `document_offsets.npy`, where each sample begins."""

    name = "torchtitan"

    def write(self, folder: Path, tokens: TokenFolder) -> None:
        """Write both files, the offsets last."""
        ends = _write_stream(folder / "tokens.bin", tokens, np.dtype("<u4"))
        with replacing(folder / "document_offsets.npy") as file:
            np.save(file, ends)

    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples, with their labels if documents have classes."""
        offsets = folder / "document_offsets.npy"
        yield from _read_stream(folder / "tokens.bin", offsets, "<u4", manifest)


class NanoGPT(Layout):
    """`tokens.bin`, uint16, as nanoGPT maps it; `offsets.npy` says where each sample begins."""

    name = "nanogpt"

    def check(self, alphabet: Alphabet) -> None:
        """Raise if ids need more than 16 bits."""
        if alphabet.size > 2**16:
            raise ConfigError(
                f"format=nanogpt: holds ids up to {2**16 - 1}, and this vocabulary has "
                f"{alphabet.size}; use format=torchtitan or format=megatron"
            )

    def write(self, folder: Path, tokens: TokenFolder) -> None:
        """Write both files, the offsets last."""
        ends = _write_stream(folder / "tokens.bin", tokens, np.dtype("<u2"))
        with replacing(folder / "offsets.npy") as file:
            np.save(file, ends)

    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples, with their labels if documents have classes."""
        yield from _read_stream(folder / "tokens.bin", folder / "offsets.npy", "<u2", manifest)
