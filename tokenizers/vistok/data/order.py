"""The order of the training samples: a pure function of the data, the seed and the position.

The stream of samples is one endless line of positions 0, 1, 2, ...; epoch e is positions
[e * N, (e + 1) * N). Nothing here knows of workers, ranks, batches or time, so the whole state of
a data stream is one integer, and it can be continued from there on any machine.

Random numbers come from numpy's Philox, a counter generator: (seed, epoch, purpose, number) is the
whole state of each draw, and nothing has to be replayed to reach it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SHARDS, _WINDOW, _SAMPLE = range(3)  # what a draw is for; its own stream each


def _philox(seed: int, epoch: int, purpose: int, number: int) -> np.random.Philox:
    # The two low words of the counter are Philox's own; ours never meet its.
    return np.random.Philox(counter=[0, 0, number, purpose], key=[seed, epoch])


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers for one sample in one epoch (crop, flip), the same in whatever process."""
    return np.random.Generator(_philox(seed, epoch, _SAMPLE, index))


def _permutation(length: int, generator: np.random.Philox) -> np.ndarray:
    # From raw bits, which numpy promises to keep; `Generator.permutation` may change some day.
    return np.argsort(generator.random_raw(length), kind="stable")


class SampleOrder:
    """Which sample stands at which position of the endless stream.

    In each epoch the shards are permuted, their samples laid end to end, and the line permuted
    inside windows of `window` samples. Each sample comes exactly once per epoch. Windows do what
    a shuffle buffer does, without its state: any position can be computed by itself, and the
    shards being read at any time are few. A window of all samples is a full permutation.

    Args:
        shard_sizes: samples of each shard, in order; sample indices count through them.
        seed: in [0, 2^64).
        window: samples per window, at least 1; None (or more than there are) for all.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, window: int | None):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())
        self.seed = seed
        self.window = min(window or self.num_samples, self.num_samples)
        self._shards: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample index in [0, N)) of a position >= 0."""
        epoch, place = divmod(position, self.num_samples)
        number, offset = divmod(place, self.window)
        return epoch, int(self._samples(epoch, number)[offset])

    def _samples(self, epoch: int, number: int) -> np.ndarray:
        """Sample indices of one window, in order."""
        if (epoch, number) not in self._windows:
            begin = number * self.window
            places = np.arange(begin, min(begin + self.window, self.num_samples))
            shards, ends = self._laid_out(epoch)
            which = np.searchsorted(ends, places, side="right")
            shard = shards[which]
            samples = self.starts[shard] + places - (ends[which] - self.sizes[shard])
            shuffled = samples[
                _permutation(len(samples), _philox(self.seed, epoch, _WINDOW, number))
            ]
            while len(self._windows) > 1:  # a batch spans two at most, but for tiny windows
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, number] = shuffled
        return self._windows[epoch, number]

    def _laid_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the place where each one ends."""
        if self._shards is None or self._shards[0] != epoch:
            shards = _permutation(len(self.sizes), _philox(self.seed, epoch, _SHARDS, 0))
            self._shards = epoch, shards, np.cumsum(self.sizes[shards])
        return self._shards[1:]
