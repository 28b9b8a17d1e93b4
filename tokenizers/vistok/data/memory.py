"""Shared memory that a loader's workers write batches to, again and again."""

from __future__ import annotations

import math
import os
import uuid
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vistok.core.torch_internals import shared_bytes

_PAGE = 4096

_MEMORIES: weakref.WeakValueDictionary[str, BatchMemory] = weakref.WeakValueDictionary()


class BatchMemory:
    """Slots for the pixels of batches, a few for each worker.

    Fresh shared memory costs a page fault for every 4 kB of pixels, and a file descriptor and a
    mapping for every batch. Here a worker writes to a slot of its own, only the slot's number goes
    through the queue, and the main process looks at the same memory. When nothing there holds the
    batch's tensor any more, the slot is free again. If none is free, because batches are kept,
    fresh memory is taken.

    Args:
        workers: that write.
        slots: for each of them.
        size: bytes of the largest batch.
    """

    def __init__(self, workers: int, slots: int, size: int):
        self.slots, self.size = slots, -(-size // _PAGE) * _PAGE
        self.name = uuid.uuid4().hex
        # A slot's state is one byte: only its worker sets it, only the main process clears it, and
        # that may be after the inference mode in which a loader was made.
        with torch.inference_mode(False):
            self._taken = torch.zeros(workers * slots, dtype=torch.uint8).share_memory_()
            self._bytes = _shared((workers * slots * self.size,))
        _MEMORIES[self.name] = self

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """In a worker: bytes of `shape` to be filled."""
        worker: Any = get_worker_info()
        for slot in range(worker.id * self.slots, (worker.id + 1) * self.slots):
            if not self._taken[slot] and math.prod(shape) <= self.size:
                self._taken[slot] = 1
                return self._at(slot).view(-1)[: math.prod(shape)].view(shape)
        return _shared(shape)

    def sent(self, tensor: Tensor) -> Any:
        """In a worker: what to send for a tensor. It arrives as one on the same memory."""
        slot, offset = divmod(tensor.data_ptr() - self._bytes.data_ptr(), self.size)
        if offset or not 0 <= slot < len(self._taken):
            return tensor
        return _Sent(self.name, slot, tuple(tensor.shape), tensor.stride())

    def received(self, slot: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """In the main process: the tensor that a worker has sent."""
        array = self._at(slot).numpy()
        # The tensor's storage holds this array, and nothing else does.
        weakref.finalize(array, _free, self._taken, slot, os.getpid()).atexit = False
        return torch.from_numpy(array).as_strided(shape, strides)

    def _at(self, slot: int) -> Tensor:
        return self._bytes[slot * self.size : (slot + 1) * self.size]


class _Sent:
    """A tensor on its way through a queue."""

    def __init__(self, *place: Any):
        self.place = place

    def __reduce__(self) -> Any:
        return _received, self.place


def _received(name: str, *place: Any) -> Tensor:
    return _MEMORIES[name].received(*place)


def _free(taken: Tensor, slot: int, process: int) -> None:
    if os.getpid() == process:  # a fork's copy of the batch says nothing of the batch
        taken[slot] = 0


def _shared(shape: tuple[int, ...]) -> Tensor:
    """Bytes that other processes see, too."""
    return shared_bytes(math.prod(shape)).view(shape)
