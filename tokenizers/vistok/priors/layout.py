"""How the ids of an image lie: what a prior knows of the tokenizer behind them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError, DataError


@dataclass(frozen=True)
class Layout:
    """The ids of an image as a prior sees them, `(N, Q)`.

    Attributes:
        sizes: number of codes of each of the Q streams.
        num_tokens: N, the largest number of tokens of an image.
        grid: (rows, columns) of the tokens, in raster order; None for a sequence.
        blocks: (rows, columns) of each block of tokens, coarse to fine, where they come in scales
            or levels; a level of a sequence has one row. Empty where they do not.
        variable: whether images have different numbers of tokens.
        num_classes: number of labels; 0 for none.
        captions: whether images have captions.
        tokenizer: hash of the tokenizer that made the ids; "" if it is not known.
    """

    sizes: tuple[int, ...]
    num_tokens: int
    grid: tuple[int, int] | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    variable: bool = False
    num_classes: int = 0
    captions: bool = False
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 2 or self.num_tokens < 1:
            raise ConfigError(
                f"layout: found {self.num_tokens} tokens of streams {list(self.sizes)}; must be "
                "one token or more, of streams of two codes or more"
            )
        if self.grid is not None and math.prod(self.grid) != self.num_tokens:
            raise ConfigError(
                f"layout.grid={list(self.grid)}: has {math.prod(self.grid)} places, but there are "
                f"{self.num_tokens} tokens"
            )
        if self.blocks and sum(self.counts) != self.num_tokens:
            raise ConfigError(
                f"layout.blocks={[list(block) for block in self.blocks]}: have {sum(self.counts)} "
                f"places, but there are {self.num_tokens} tokens"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each block."""
        return tuple(rows * columns for rows, columns in self.blocks)

    @property
    def num_streams(self) -> int:
        """Q."""
        return len(self.sizes)

    def as_config(self) -> dict[str, Any]:
        """Return plain containers, as a run stores them."""
        values = dataclasses.asdict(self)
        values["sizes"] = list(self.sizes)
        values["grid"] = None if self.grid is None else list(self.grid)
        values["blocks"] = [list(block) for block in self.blocks]
        return values

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Layout:
        """Inverse of `as_config`."""
        grid = values.get("grid")
        return cls(
            sizes=tuple(values["sizes"]),
            num_tokens=int(values["num_tokens"]),
            grid=None if grid is None else (int(grid[0]), int(grid[1])),
            blocks=_blocks(values.get("blocks") or ()),
            variable=bool(values.get("variable", False)),
            num_classes=int(values.get("num_classes", 0)),
            captions=bool(values.get("captions", False)),
            tokenizer=str(values.get("tokenizer") or ""),
        )

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], num_classes: int = 0) -> Layout:
        """Return the layout of the ids in a folder of tokens.

        Args:
            manifest: of the folder, see `vistok.data.tokens.TokenFolder`.
            num_classes: number of labels, which the folder may know by its samples alone.
        """
        count, grid = manifest["num_tokens"], manifest["grid"]
        if grid is not None and (len(grid) != 2 or math.prod(grid) != count):
            grid = None  # of scales, or of latents that are others than the tokens
        return cls.from_config(
            {
                "sizes": [stream["size"] for stream in manifest["streams"]],
                "num_tokens": count,
                "grid": grid,
                "blocks": manifest.get("scales") or (),
                "variable": manifest["lengths"] == "variable",
                "num_classes": num_classes,
                "captions": bool(manifest.get("captions")),
                "tokenizer": manifest["tokenizer_hash"],
            }
        )

    def check(self, ids: Tensor, name: str) -> None:
        """Raise if ids `(B, N, Q)` are not of this layout.

        Args:
            ids: integers; places behind an image's own length may hold anything in range.
            name: what they are from, for the message.

        Raises:
            DataError: naming the stream.
        """
        if ids.ndim != 3 or ids.shape[2] != self.num_streams or ids.shape[1] > self.num_tokens:
            raise DataError(
                f"{name}: ids of shape {tuple(ids.shape)}, expected (B, {self.num_tokens}, "
                f"{self.num_streams})"
            )
        if not ids.numel():
            return
        low, high = ids.amin(dim=(0, 1)).tolist(), ids.amax(dim=(0, 1)).tolist()
        for stream, size in enumerate(self.sizes):
            if low[stream] < 0 or high[stream] >= size:
                bad = low[stream] if low[stream] < 0 else high[stream]
                raise DataError(
                    f"{name}: stream {stream} holds the id {bad}; valid are 0 to {size - 1}"
                )


def _blocks(blocks: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Return (rows, columns) of blocks given as such, or as the number of their tokens."""
    pairs = ((1, block) if isinstance(block, int) else (1, *block)[-2:] for block in blocks)
    return tuple((int(rows), int(columns)) for rows, columns in pairs)


def parents(blocks: Sequence[tuple[int, int]]) -> Tensor:
    """Return for each token the one before it that it is predicted from.

    It is the token of the block before that covers the same part of the picture, the nearest one
    where the blocks do not divide.

    Returns:
        `(N,)` int64; -1 in the first block.
    """
    found, start = [torch.full((math.prod(blocks[0]),), -1)], 0
    for (rows, columns), (next_rows, next_columns) in itertools.pairwise(blocks):
        row = torch.arange(next_rows) * rows // next_rows
        column = torch.arange(next_columns) * columns // next_columns
        found.append((row[:, None] * columns + column[None, :]).flatten() + start)
        start += rows * columns
    return torch.cat(found)
