"""Turn positions into batches: the data set of the loader's workers, and their samplers."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vistok.core import ranks as distributed
from vistok.core.errors import DataError, VistokError
from vistok.data.decode import MAX_PIXELS, DecodeError, decode
from vistok.data.deep import Range
from vistok.data.fields import Field
from vistok.data.loader_internals import has_workers, share_by_need, stop_workers
from vistok.data.memory import BatchMemory
from vistok.data.names import shown
from vistok.data.order import Order, SampleRandom
from vistok.data.skipped import Skip
from vistok.data.sources import Source
from vistok.data.transforms import Transform

Batch = dict[str, Any]

Request = tuple[int, int]  # epoch and number of a member; number -1 asks for padding

MAX_SUBSTITUTES = 100  # bad images in a row before we say that the set is broken


class Row(NamedTuple):
    """The entries of one sample in a batch, without its pixels."""

    key: str
    label: int
    index: int
    fields: list[Any]


class StreamError(DataError):
    """A `DataError` raised in a loader's worker.

    torch raises a worker's exception again with its whole traceback as the message; of that
    only the message itself is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class ImageDataset(Dataset):
    """Decoded, cropped and collated images of some members of a source.

    Args:
        source: of the bytes.
        members: indices into the source, in order; None for all of it.
        transform: from a decoded image to one of the batch's size.
        channels: 1, 3 or 4.
        seed: of the crops and augmentations.
        substitute: an image that does not decode is replaced by the next good one (training,
            where shapes must hold) or left out (validation).
        scaled: decode large JPEGs at a fraction of their size, where the transform allows it.
        fields: what is read in addition to image and label; a sample without one is unusable too.
        buckets: sizes other than the transform's, and `(N,)` which of them each member has; a
            batch is of one of them.
        value_range: black and white of images of more than 8 bits; see `decode`.
        max_pixels: of an image; larger ones are unusable.
    """

    def __init__(
        self,
        source: Source,
        members: np.ndarray | None,
        transform: Transform,
        channels: int,
        seed: int,
        substitute: bool,
        scaled: bool = False,
        fields: Sequence[Field] = (),
        buckets: tuple[Sequence[Transform], np.ndarray] | None = None,
        value_range: Range | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.source, self.members, self.transform = source, members, transform
        self.channels, self.seed, self.substitute = channels, seed, substitute
        self.scaled, self.fields, self.buckets = scaled, fields, buckets
        self.value_range, self.max_pixels = value_range, max_pixels
        self.memory: BatchMemory | None = None  # that a worker writes to
        self._random = SampleRandom()

    def __len__(self) -> int:
        return len(self.source) if self.members is None else len(self.members)

    @property
    def largest_image(self) -> int:
        """Bytes of the largest image in a batch."""
        transforms = [self.transform, *(self.buckets[0] if self.buckets else ())]
        return max(math.prod(transform.size) for transform in transforms) * self.channels

    @property
    def shard_sizes(self) -> np.ndarray:
        """`(S,)` int64, members in each shard."""
        if self.members is None:
            return self.source.shard_sizes
        ends = np.searchsorted(self.members, np.cumsum(self.source.shard_sizes))
        return np.diff(ends, prepend=0)

    def __getitem__(self, request: Request) -> Batch:
        return self.__getitems__([request])

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """Load a batch.

        Returns:
            `image` (B, C, H, W) uint8, channels last in memory, as images are decoded; `key` list
            of str, `label` (B,) int64 with -1 for none, `index` (B,) int64 into the source, `valid`
            (B,) bool, False for padding (black), and `skipped`, a list of `Skip` (key, reason,
            cause) of the images met that cannot be used; and each field by its name, list of str
            or tensor (B, ...).

        Raises:
            StreamError: if there are only bad images for long, or a shard cannot be read.
        """
        try:
            return self._load(requests)
        except VistokError as error:
            raise StreamError(str(error)) from None

    def _load(self, requests: Sequence[Request]) -> Batch:
        skipped: list[Skip] = []
        transform = self._transform_of(requests)
        shape = len(requests), *transform.size, self.channels
        if self.memory is not None and get_worker_info() is not None:
            images = self.memory.take(shape)
        else:
            images = torch.empty(shape, dtype=torch.uint8)
        rows: list[Row | None] = []
        for epoch, number in requests:
            row = None
            if number >= 0:
                target = images[len(rows)]
                row = self._sample(epoch, number, transform, target, skipped)
                if row is None:
                    continue
            rows.append(row)
        rows = rows or [None]  # a batch is never empty: ranks must step together
        images = images[: len(rows)]
        valid = torch.tensor([row is not None for row in rows])
        if not valid.all():
            images[~valid] = 0
        fields = {
            field.name: field.collate([None if row is None else row.fields[i] for row in rows])
            for i, field in enumerate(self.fields)
        }
        return {
            "image": images.permute(0, 3, 1, 2),
            "key": ["" if row is None else row.key for row in rows],
            "label": torch.tensor([-1 if row is None else row.label for row in rows]),
            "index": torch.tensor([-1 if row is None else row.index for row in rows]),
            "valid": valid,
            "skipped": skipped,
            **fields,
        }

    def _transform_of(self, requests: Sequence[Request]) -> Transform:
        if self.buckets is None:
            return self.transform
        transforms, which = self.buckets
        return transforms[which[requests[0][1]]]

    def _sample(
        self,
        epoch: int,
        number: int,
        transform: Transform,
        target: torch.Tensor,
        skipped: list[Skip],
    ) -> Row | None:
        """Read a member, or the next good one, and write its pixels to `target` (H, W, C)."""
        tried = 0
        for member in self._candidates(number):
            tried += 1
            index = member if self.members is None else int(self.members[member])
            try:
                key, data, label = self.source.read(index)
                fields = [field.read(self.source, index) for field in self.fields]
                seeded = partial(self._random, self.seed, epoch, index)
                smaller = transform.reduction(seeded) if self.scaled else None
                image = decode(data, self.channels, smaller, self.value_range, self.max_pixels)
                transform.write(image, seeded(), target, self.max_pixels)
            except DecodeError as error:
                reason = f"{self.source.locate(index)}: {error}"
                skipped.append(Skip(self._key(index), reason, error.cause))
            except OSError as error:
                reason = f"{self.source.locate(index)}: {error.strerror or error}"
                skipped.append(Skip(self._key(index), reason, "unreadable"))
            else:
                return Row(key, -1 if label is None else label, index, fields)
        if not self.substitute:
            return None
        what = "no image" if tried < MAX_SUBSTITUTES else f"none of {tried} images in a row"
        last = skipped[-1]
        raise DataError(f"{self.source.name}: {what} can be used; {last.key}: {last.reason}")

    def _key(self, index: int) -> str:
        return shown(bytes(self.source.keys[index]))

    def _candidates(self, number: int) -> Iterator[int]:
        """Yield a member and those that may take its place: the next ones of its size, in turn."""
        yield number
        if not self.substitute:
            return
        alike = np.arange(len(self))
        if self.buckets is not None:
            alike = np.flatnonzero(self.buckets[1] == self.buckets[1][number])
        place = int(np.searchsorted(alike, number))
        for step in range(1, min(MAX_SUBSTITUTES, len(alike))):
            yield int(alike[(place + step) % len(alike)])


class StreamSampler:
    """Batches of requests from the endless training stream, for this rank.

    Global batch t takes positions [p + tG, p + (t+1)G) with G = batch_size * world size, and rank
    r the r-th part of it. Each iteration begins at the position that holds then, so what a loader
    had fetched ahead without its being consumed comes again.

    Args:
        order: of the samples.
        batch_size: per rank.
        position: returns p, the number of samples consumed by all ranks.
        batches_per_step: that a rank's optimizer step accumulates.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        position: Callable[[], int],
        batches_per_step: int = 1,
    ):
        self.order, self.batch_size, self.position = order, batch_size, position
        self.batches_per_step = batches_per_step

    def __len__(self) -> int:
        """Return the batches in an epoch of Lightning; the stream itself does not end.

        Whole steps, for at an epoch's end Lightning steps with what it has.
        """
        per_step = self.batch_size * distributed.world_size() * self.batches_per_step
        return max(1, self.order.num_samples // per_step) * self.batches_per_step

    def __iter__(self) -> Iterator[list[Request]]:
        return self._batches(self.position())

    def _batches(self, position: int) -> Iterator[list[Request]]:
        position += distributed.rank() * self.batch_size
        while True:
            yield [self.order(p) for p in range(position, position + self.batch_size)]
            position += distributed.world_size() * self.batch_size


class EvalSampler:
    """All members exactly once over all ranks, in order, in equally many batches on each rank.

    The last global batch is dealt out evenly and filled up with padding where it does not divide.

    Args:
        num_samples: of the set.
        batch_size: per rank.
        first: batches to leave out at the beginning, for they were taken before.
    """

    def __init__(self, num_samples: int, batch_size: int, first: int = 0):
        self.num_samples, self.batch_size, self.first = num_samples, batch_size, first

    def __len__(self) -> int:
        batches = -(-self.num_samples // (self.batch_size * distributed.world_size()))
        return max(0, batches - self.first)

    def __iter__(self) -> Iterator[list[Request]]:
        rank, world = distributed.rank(), distributed.world_size()
        step = self.batch_size * world
        for begin in range(self.first * step, self.num_samples, step):
            left = self.num_samples - begin
            share = min(self.batch_size, -(-left // world))
            first = begin + rank * share
            yield [
                (0, number if number < self.num_samples else -1)
                for number in range(first, first + share)
            ]


def _as_sent(batch: Any) -> Batch:
    """Return what goes through the queue: pixels by their slot, small tensors as arrays.

    These are pickled at once, where torch would open shared memory for each.
    """
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    # numpy has no bfloat16; such a tensor goes as torch sends it.
    known = (k for k, v in tensors.items() if v.nbytes < 2**16 and v.dtype != torch.bfloat16)
    sent = batch | {name: tensors[name].numpy() for name in known}
    worker: Any = get_worker_info()
    if worker is not None and worker.dataset.memory is not None:
        sent["image"] = worker.dataset.memory.sent(batch["image"])
    return sent


def _as_received(batch: Batch) -> Batch:
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    return batch | {name: torch.from_numpy(value) for name, value in arrays.items()}


class ImageLoader(DataLoader):
    """A stock DataLoader that shows each batch to `on_batch`, in the main process.

    Args:
        dataset: collates its batches itself.
        sampler: of batches.
        num_workers: processes.
        on_batch: called with each batch before it is handed out.

    Attributes:
        wait_seconds: how long the main process waited for batches, over all iterations.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: StreamSampler | EvalSampler,
        num_workers: int,
        on_batch: Callable[[Batch], None],
    ):
        super().__init__(
            copy.copy(dataset),
            batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
            num_workers=num_workers,
            collate_fn=_as_sent,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            # Each iteration draws a seed; from here, lest it move the run's own generator.
            generator=torch.Generator(),
        )
        self.on_batch = on_batch
        self.wait_seconds = 0.0

    def __iter__(self) -> Any:
        if self.num_workers and not has_workers(self):
            self._lend_memory()
        batches: Any = super().__iter__()
        if self.num_workers:
            share_by_need(batches)
        try:
            while True:
                begun = time.perf_counter()
                batch = next(batches, None)
                self.wait_seconds += time.perf_counter() - begun
                if batch is None:
                    return
                batch = _as_received(batch)
                self.on_batch(batch)
                yield batch
        except Exception:
            # The traceback would keep the iterator until some collection of cycles, which stops
            # its workers only by killing them, and that raises an error wherever we are then.
            if self.num_workers:
                stop_workers(self, batches)
            raise

    def _lend_memory(self) -> None:
        """Give each worker that is about to start slots: for what is under way, and two more."""
        dataset: Any = self.dataset
        sampler: Any = self.batch_sampler
        slots, size = (self.prefetch_factor or 0) + 2, dataset.largest_image * sampler.batch_size
        try:
            dataset.memory = BatchMemory(self.num_workers, slots, size)
        except RuntimeError:  # there is less shared memory than that; it is taken batch by batch
            dataset.memory = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the DataModule has the position. Lightning asks for this to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing; see `state_dict`."""


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
