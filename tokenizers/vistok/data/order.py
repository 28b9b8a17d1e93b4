"""The order of the training samples: a pure function of the data, the seed and the position.

The stream of samples is one endless line of positions 0, 1, 2, ...; epoch e is positions
[e * N, (e + 1) * N). Nothing here knows of workers, ranks, batches or time, so the whole state of
a data stream is one integer, and it can be continued from there on any machine.

Random numbers come from numpy's Philox, a counter generator: (seed, epoch, purpose, number) is the
whole state of each draw, and nothing has to be replayed to reach it.

WebDataset and torch's loader know no such position: they shuffle in buffers, per worker and rank,
and a resume replays an epoch or begins a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

_SHARDS, _WINDOW, _SAMPLE = range(3)  # what a draw is for; its own stream each

_PURPOSES = 3


def _philox(seed: int, epoch: int, purpose: int, number: int) -> np.random.Philox:
    # The two low words of the counter are Philox's own; ours never meet its.
    return np.random.Philox(counter=[0, 0, number, purpose], key=[seed, epoch])


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random numbers of one sample in one epoch (crop, flip), equal in any process."""
    return np.random.Generator(_philox(seed, epoch, _SAMPLE, index))


class SampleRandom:
    """A cheaper `sample_rng`: one generator, which each call sets anew."""

    def __init__(self) -> None:
        self._generator = sample_rng(0, 0, 0)
        self._state: Any = self._generator.bit_generator.state  # as it is before the first number

    def __call__(self, seed: int, epoch: int, index: int) -> np.random.Generator:
        """Return the sample's generator, which is valid until the next call."""
        self._state["state"]["counter"][2:] = index, _SAMPLE
        self._state["state"]["key"][:] = seed, epoch
        self._generator.bit_generator.state = self._state
        return self._generator


def _permutation(length: int, generator: np.random.Philox) -> np.ndarray:
    # From raw bits, which numpy promises to keep; `Generator.permutation` may change some day.
    return np.argsort(generator.random_raw(length), kind="stable")


class Order(Protocol):
    """The sample at each position of an endless stream.

    Attributes:
        num_samples: how many different ones there are.
        window: samples per shuffling window.
    """

    num_samples: int
    window: int

    def __call__(self, position: int) -> tuple[int, int]:
        """Return (a number that differs for each pass over the sample, sample index)."""
        ...


class SampleOrder:
    """The sample at each position of the endless stream.

    In each epoch the shards are permuted, their samples laid end to end, and the line permuted
    inside windows of `window` samples. Each sample comes exactly once per epoch. Windows do what
    a shuffle buffer does, without its state: any position can be computed by itself, and the
    shards being read at any time are few. A window of all samples is a full permutation.

    Args:
        shard_sizes: samples of each shard, in order; sample indices count through them.
        seed: in [0, 2^64).
        window: samples per window, at least 1; None (or more than there are) for all.
        stream: number of this order among several of one seed, which then differ.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        seed: int,
        window: int | None,
        stream: int = 0,
    ):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())
        self.seed, self.stream = seed, stream
        self.window = min(window or self.num_samples, self.num_samples)
        self._shards: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample index in [0, N)) of a position >= 0."""
        epoch, place = divmod(position, self.num_samples)
        number, offset = divmod(place, self.window)
        return epoch, int(self._samples(epoch, number)[offset])

    def _philox(self, epoch: int, purpose: int, number: int) -> np.random.Philox:
        return _philox(self.seed, epoch, purpose + _PURPOSES * self.stream, number)

    def _samples(self, epoch: int, number: int) -> np.ndarray:
        """Return the sample indices of one window, in order."""
        if (epoch, number) not in self._windows:
            begin = number * self.window
            places = np.arange(begin, min(begin + self.window, self.num_samples))
            shards, ends = self._laid_out(epoch)
            which = np.searchsorted(ends, places, side="right")
            shard = shards[which]
            samples = self.starts[shard] + places - (ends[which] - self.sizes[shard])
            shuffled = samples[_permutation(len(samples), self._philox(epoch, _WINDOW, number))]
            while len(self._windows) > 1:  # a batch spans two at most, but for tiny windows
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, number] = shuffled
        return self._windows[epoch, number]

    def _laid_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's order of shards, and the place where each one ends."""
        if self._shards is None or self._shards[0] != epoch:
            shards = _permutation(len(self.sizes), self._philox(epoch, _SHARDS, 0))
            self._shards = epoch, shards, np.cumsum(self.sizes[shards])
        return self._shards[1:]


class ResampledOrder(SampleOrder):
    """Samples drawn with replacement: in N draws of N, one of three is missing on average.

    Position p belongs to block p // window. For each block as many shards are drawn, in proportion
    to their samples, as hold a block on average; each position then draws one of these and a sample
    of it. So all samples are equally likely everywhere, and a small window reads from few shards
    at a time.
    """

    def __call__(self, position: int) -> tuple[int, int]:
        """Return (position, sample index): crops differ wherever a sample comes again."""
        number, offset = divmod(position, self.window)
        return position, int(self._samples(0, number)[offset])

    def _samples(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) not in self._windows:
            few = -(-self.window * int((self.sizes > 0).sum()) // self.num_samples)
            ends = self.starts + self.sizes
            drawn = _uniform(self._philox(epoch, _SHARDS, number), few) * self.num_samples
            shards = np.searchsorted(ends, drawn.astype(np.int64), side="right")
            which, inside = _uniform(self._philox(epoch, _WINDOW, number), 2 * self.window).reshape(
                2, self.window
            )
            shard = shards[(which * few).astype(np.int64)]
            samples = self.starts[shard] + (inside * self.sizes[shard]).astype(np.int64)
            while len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, number] = samples
        return self._windows[epoch, number]


def _uniform(generator: np.random.Philox, count: int) -> np.ndarray:
    """Return `(count,)` numbers in [0, 1), from raw bits like `_permutation`."""
    return (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53


class MixtureOrder:
    """Several orders interleaved by weight, each going through its own passes.

    Positions are cut into runs of `unit`, and runs into blocks of `block`. In each block order k
    has `shares[k]` runs, evenly spread, always in the same places. So the position within each
    order is arithmetic too.

    Args:
        orders: to interleave; their samples are numbered one after the other.
        weights: of each, positive; only their ratios matter.
        unit: positions in a row from one order.

    Raises:
        ValueError: if a weight is less than half a run in a block.
    """

    block = 10_000

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], unit: int = 1):
        self.orders, self.unit = list(orders), unit
        sizes = np.array([order.num_samples for order in orders], dtype=np.int64)
        self.starts = np.cumsum(sizes) - sizes
        self.num_samples = int(sizes.sum())
        self.window = max(order.window for order in orders)
        self.shares = _apportioned(np.asarray(weights, dtype=np.float64), self.block)
        if not self.shares.all():
            raise ValueError(f"a weight is below 1/{2 * self.block} of their sum")
        middles = [(np.arange(share) + 0.5) / share for share in self.shares]
        owner = np.repeat(np.arange(len(self.shares)), self.shares)
        self._owner = owner[np.argsort(np.concatenate(middles), kind="stable")]
        self._before = np.zeros(self.block, dtype=np.int64)  # earlier runs of the same order
        for number, share in enumerate(self.shares):
            self._before[self._owner == number] = np.arange(share)

    def __call__(self, position: int) -> tuple[int, int]:
        """Return what its order has for a position, and the sample's index among all."""
        run, offset = divmod(position, self.unit)
        block, slot = divmod(run, self.block)
        owner = int(self._owner[slot])
        earlier = block * int(self.shares[owner]) + int(self._before[slot])
        epoch, index = self.orders[owner](earlier * self.unit + offset)
        return epoch, int(self.starts[owner]) + index


class RenumberedOrder:
    """An order whose samples are called by other numbers.

    Args:
        order: of 0 to N - 1.
        numbers: `(N,)` what each is to be called.
    """

    def __init__(self, order: Order, numbers: np.ndarray):
        self.order, self.numbers = order, numbers
        self.num_samples, self.window = order.num_samples, order.window

    def __call__(self, position: int) -> tuple[int, int]:
        """Return the pass and the sample's new number."""
        epoch, index = self.order(position)
        return epoch, int(self.numbers[index])


def _apportioned(weights: np.ndarray, seats: int) -> np.ndarray:
    """Return whole numbers in proportion to `weights` whose sum is `seats` (largest remainders)."""
    exact = weights / weights.sum() * seats
    shares = np.floor(exact).astype(np.int64)
    rest = np.argsort(shares - exact, kind="stable")[: seats - int(shares.sum())]
    shares[rest] += 1
    return shares
