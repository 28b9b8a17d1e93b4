"""Random numbers that belong to samples: the same on any rank and in any batch.

Within `drawing`, which the trainer enters for each batch, a number is a function of the seed, the
position of its sample in the data stream, and how many draws the forward has made before. So two
ranks draw what one process would have drawn for the same images, and a resumed run what a whole
one would have. Elsewhere numbers come from torch's generator.

The function is a counter generator: SplitMix64 (Steele et al. 2014), with a key for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, whose products wrap around

_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class _Draws:
    """The values that the numbers of one forward depend on."""

    def __init__(self, seed: int, positions: Tensor, step: Tensor) -> None:
        self.seed, self.positions, self.step = seed, positions, step
        self.calls = 0

    def words(self, rows: Tensor, count: int) -> Tensor:
        """Return int64 `(len(rows), count)`, with all bits random."""
        self.calls += 1
        call = (self.calls * (_GOLDEN >> 1) + 2**63) % 2**64 - 2**63  # as int64
        keys = _mix(_mix(rows * _GOLDEN + self.seed) + call)
        counter = torch.arange(1, count + 1, device=rows.device)
        return _mix(keys[:, None] + counter * _GOLDEN)


_current: _Draws | None = None


@contextmanager
def drawing(seed: int, positions: Tensor, step: int) -> Iterator[None]:
    """Draw for the samples of a batch within this context.

    Args:
        seed: of the run, in [0, 2^63).
        positions: `(B,)` int64, of the samples in the data stream.
        step: position at which the optimizer step began, the same for all its batches and ranks.
    """
    global _current
    before, _current = _current, _Draws(seed, positions, torch.tensor([step]))
    try:
        yield
    finally:
        _current = before


@contextmanager
def aside() -> Iterator[None]:
    """Draw within this context without moving the numbers that are drawn after it."""
    calls = _current.calls if _current is not None else 0
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
    if _current is not None:
        _current.calls = calls


def uniform(shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Draw float32 numbers in [0, 1).

    Args:
        shape: B samples come first; what follows, or is flattened into the first dimension, is
            the sample's own.
        device: where to.
    """
    if _current is None:
        return torch.rand(tuple(shape), device=device)
    return _unit(_shift(_words(_current, shape, device), 40)).view(tuple(shape))


def normal(shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Draw standard normal float32 numbers; `shape` as in `uniform`."""
    if _current is None:
        return torch.randn(tuple(shape), device=device)
    count = math.prod(shape) // max(1, len(_current.positions))
    words = _current.words(_current.positions.to(device), -(-count // 2))
    # Box and Muller: two from each word.
    radius = (-2 * (_unit(_shift(words, 40)) + 2**-25).log()).sqrt()
    angle = _unit(words & 0xFFFFFF) * (2 * math.pi)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :count].reshape(tuple(shape))


def integers(
    low: int, high: int, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Draw int64 numbers in [low, high); `shape` as in `uniform`."""
    if _current is None:
        return torch.randint(low, high, tuple(shape), device=device)
    words = _words(_current, shape, device)
    return (low + _shift(words, 24) % (high - low)).view(tuple(shape))


def chances(share: float, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Draw bools that are True with a probability, to 1/65536; `shape` as in `uniform`.

    Four of them cost what one number of `uniform` costs: for dropout.
    """
    if _current is None:
        return torch.rand(tuple(shape), device=device) < share
    count = math.prod(shape) // max(1, len(_current.positions))
    words = _current.words(_current.positions.to(device), -(-count // 4))
    parts = words.view(torch.int16)[:, :count]  # from -32768 to 32767
    limit = round(share * 65536) - 32768
    return (parts.int() < limit).reshape(tuple(shape))


def shared_integer(low: int, high: int, device: torch.device | str | None = None) -> Tensor:
    """Draw an int64 `(1,)` in [low, high): one for all batches and ranks of an optimizer step."""
    if _current is None:
        return torch.randint(low, high, (1,), device=device)
    words = _current.words(_current.step.to(device), 1)
    return low + _shift(words[0], 24) % (high - low)


def _words(draws: _Draws, shape: Sequence[int], device: torch.device | str | None) -> Tensor:
    rows = draws.positions.to(device)
    return draws.words(rows, math.prod(shape) // max(1, len(rows)))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, and fill with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _unit(bits: Tensor) -> Tensor:
    """Map 24 bits to [0, 1)."""
    return bits.float() * 2**-24
