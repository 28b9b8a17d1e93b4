"""Form 1 of a config: quantizers with scales took the number of tokens for a grid of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vistok.core.geometry import as_pair

_WITH_SCALES = ("MultiScale", "MultiScaleVQ", "MultiScaleSharedIndexVQ", "ImageFolder")


def keep_grids(config: dict[str, Any]) -> None:
    """Write down the grid that quantizers with scales used, where it is not the encoder's.

    With `grid: auto`, the default, N tokens were a square if N is one, else a line; with `2d`
    always a square, and with `1d` a line. An encoder whose N can't be read off its config leaves
    "auto", which the quantizer refuses with an error that says what to write.
    """
    tokens = _tokens(config.get("tokenizer"))
    for part in _mappings(config.get("quantizer")):
        if _class(part) not in _WITH_SCALES:
            continue
        old = part.setdefault("grid", "auto")
        if old not in ("auto", "1d", "2d") or tokens is None:
            continue
        count = math.prod(tokens)
        side = math.isqrt(count)
        used = (side, side) if old != "1d" and side * side == count else (count,)
        part["grid"] = None if used == tokens else list(used)


def _tokens(tokenizer: Any) -> tuple[int, ...] | None:
    """(rows, columns) or (N,) of the tokens of an encoder of form 1; None if it is not known."""
    encoder = tokenizer.get("encoder") if isinstance(tokenizer, dict) else None
    if not isinstance(encoder, dict):
        return None
    if type(count := encoder.get("num_latent_tokens")) is int:
        return (count,)
    if _class(encoder) in ("CNNEncoder", "MaskGITEncoder"):
        cell = encoder.get("stem", 1) * 2 ** (len(encoder["channel_multipliers"]) - 1)
        height, width = as_pair(encoder["image_size"])
        return height // cell, width // cell
    return None


def _class(part: dict[str, Any]) -> str:
    return str(part.get("_target_")).rpartition(".")[2]


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a mapping and every mapping within."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)
