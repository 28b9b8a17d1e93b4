"""All layouts, by the names that `format=` takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vistok.core.errors import ConfigError, nearest
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
    yield from layouts[0].read(tokens.path / format, tokens.manifest)
