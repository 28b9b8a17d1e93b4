"""Every private name of torch's DataLoader that vistok uses, as small functions, in one place.

torch may rename any of them in a new version: pyproject.toml bounds the versions, and
tests/test_internals.py fails when a name is gone or does something else.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def has_workers(loader: DataLoader) -> bool:
    """Return whether a loader's persistent workers have been started.

    What they are to share with the main process must be there before; no public attribute tells.
    """
    return loader._iterator is not None


def share_by_need(batches: Any) -> None:
    """Give each next batch to the worker that has the fewest to be done.

    In torch they take turns, so that all go at the pace of the slowest one; there is no option. The
    order in which batches come does not depend on it.

    Args:
        batches: the iterator of a loader with workers.
    """
    batches._worker_queue_idx_cycle = _least_busy(weakref.proxy(batches))


def _least_busy(batches: Any) -> Iterator[int]:
    while True:
        waiting = [0] * batches._num_workers
        for worker, *arrived in batches._task_info.values():
            waiting[worker] += not arrived
        yield waiting.index(min(waiting))


def stop_workers(loader: DataLoader, batches: Any) -> None:
    """Stop a loader's workers in order, now; they are started again when they are needed.

    torch does so when the iterator is collected, of which nobody knows when it is.

    Args:
        loader: with workers.
        batches: its iterator.
    """
    batches._shutdown_workers()
    loader._iterator = None
