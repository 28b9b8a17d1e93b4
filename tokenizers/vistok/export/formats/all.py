"""All layouts, by the names that `format=` takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vistok.core.errors import ConfigError, DataError, nearest
from vistok.data.token_shards import file_sha256
from vistok.data.tokens import TokenFolder, TokenSample
from vistok.export.formats.base import Layout
from vistok.export.formats.flat import NanoGPT, Torchtitan
from vistok.export.formats.llamagen import LlamaGen
from vistok.export.formats.megatron import Megatron
from vistok.export.formats.tables import Parquet, WebDataset

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (Megatron(), Torchtitan(), NanoGPT(), WebDataset(), Parquet(), LlamaGen())
}

#: The folder's own shards, which every other layout is made of.
NATIVE = "native"


def chosen(names: Iterable[str]) -> list[Layout]:
    """Return layouts by name, each once; the native one is always written and adds none.

    Raises:
        ConfigError: for a name that is not known.
    """
    for name in names:
        if name not in LAYOUTS and name != NATIVE:
            known = [NATIVE, *LAYOUTS]
            raise ConfigError(
                f"format={name}: must be of {', '.join(known)}{nearest(str(name), known)}"
            )
    return [LAYOUTS[name] for name in dict.fromkeys(names) if name != NATIVE]


def samples_of(tokens: TokenFolder, format: str = NATIVE) -> Iterator[TokenSample]:
    """Yield the samples of a folder, read from one of its layouts.

    Raises:
        ConfigError: for a name that is not known.
        DataError: if the folder has no such layout, or a file is damaged.
    """
    layouts = chosen([format])
    if not layouts:
        yield from (tokens[index] for index in range(len(tokens)))
        return
    folder, known = tokens.path / format, tokens.manifest.get("formats") or {}
    if format not in known:
        there = ", ".join([NATIVE, *known])
        raise DataError(f"{tokens.path}: was not written as {format}; it has {there}")
    if tokens.verify and digest_of(folder) != known[format]:
        raise DataError(f"{folder}: a file is missing or altered; copy the folder again")
    yield from layouts[0].read(folder, tokens.manifest)


def digest_of(folder: Path) -> dict[str, Any]:
    """Return number, bytes and a joint checksum of the files of a layout.

    The checksum is the SHA-256 of a line for each file, in the order of their names: its name, a
    zero byte and its own SHA-256.
    """
    summed, files, size = hashlib.sha256(), 0, 0
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    for name in names:
        summed.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
        files, size = files + 1, size + (folder / name).stat().st_size
    return {"files": files, "bytes": size, "sha256": summed.hexdigest()}
