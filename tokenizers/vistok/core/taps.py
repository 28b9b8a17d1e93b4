"""Taps: named features, collected on the way through a forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor


class Tap(NamedTuple):
    """Shape of the features `(B, places, width)` that a tap hands out.

    Attributes:
        width: of the features.
        grid: of the places, such as (rows, columns), in raster order; None for a sequence.
    """

    width: int
    grid: tuple[int, ...] | None = None


class Taps:
    """Collects the features that someone asked for, by their names.

    A part offers everything that it can hand out, and only what is wanted is kept:

        for number, block in enumerate(self.blocks):
            x = block(x)
            taps.offer(f"block.{number}", x)

    Args:
        names: what to keep, such as "decoder.block.3".
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = frozenset(names)
        self.features: dict[str, Tensor] = {}
        self._prefix = ""

    def offer(self, name: str, features: Tensor) -> None:
        """Keep features `(B, places, width)` if they are wanted."""
        if self._prefix + name in self.names:
            self.features[self._prefix + name] = features

    def wants(self, name: str) -> bool:
        """Return whether features would be kept, for those that cost something to compute."""
        return self._prefix + name in self.names

    def inside(self, part: str) -> Taps:
        """Return the same taps as a part sees them, whose names begin with `part.` here."""
        inner = Taps()
        inner.names, inner.features = self.names, self.features
        inner._prefix = f"{self._prefix}{part}."
        return inner


#: For whoever asks for nothing.
NO_TAPS = Taps()


def inside(part: str, shapes: Mapping[str, Tap]) -> dict[str, Tap]:
    """Return the taps of a part under the names that they have in the whole."""
    return {f"{part}.{name}": tap for name, tap in shapes.items()}
