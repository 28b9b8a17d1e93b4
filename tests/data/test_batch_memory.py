"""Batches come through shared memory that is used again; who keeps one must not see it change."""

import gc
import itertools
from multiprocessing import Condition, Value

import numpy as np
import pytest
import torch

from helpers import PATIENCE
from vistok.data import dataset as dataset_module
from vistok.data.datamodule import VistokDataModule
from vistok.data.memory import BatchMemory


def stream(shards, workers, **options):
    options = {"image_size": 16, "batch_size": 8, "augment": ["hflip"], **options}
    data = VistokDataModule("shards", f"{shards}/*.tar", num_workers=workers, **options)
    data.setup("fit")
    return data.train_dataloader()


def first(loader, count):
    return [batch["image"] for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("prefetched", [2, 4])
def test_kept_batches_stay_as_they_came(shards, prefetched):
    """Far more of them than there are slots, whole ones and single images."""
    expected = first(stream(shards, 0), 40)
    loader = stream(shards, 2)
    loader.prefetch_factor = prefetched
    whole = first(loader, 20)
    assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=False))
    loader = stream(shards, 2)
    kept = [batch[-1].numpy() for batch in first(loader, 40)]
    gc.collect()
    for image, batch in zip(kept, expected, strict=True):
        assert np.array_equal(image, batch[-1].numpy())


def test_memory_is_used_again_when_nobody_holds_it(shards):
    loader = stream(shards, 2)
    places = [batch["image"].data_ptr() for batch in itertools.islice(loader, 60)]
    assert len(set(places)) <= 2 * (loader.prefetch_factor + 2)
    batch = next(iter(loader))["image"]
    assert batch.shape == (8, 3, 16, 16)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_without_shared_memory_for_slots(shards, monkeypatch):
    def none(*_):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(dataset_module, "BatchMemory", none)
    expected = first(stream(shards, 0), 12)
    found = first(stream(shards, 2), 12)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_fork_that_drops_a_batch_does_not_free_it(monkeypatch):
    memory = BatchMemory(1, 1, 10)
    memory._taken[0] = 1
    tensor = memory.received(0, (10,), (1,))
    monkeypatch.setattr("os.getpid", lambda: -1)
    del tensor
    assert memory._taken[0]
    monkeypatch.undo()
    tensor = memory.received(0, (10,), (1,))
    part = tensor[3:]
    del tensor
    assert memory._taken[0]
    del part
    assert not memory._taken[0]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_memory_of_a_loader_that_was_made_for_inference_is_freed_in_training():
    with torch.inference_mode():
        memory = BatchMemory(1, 1, 10)
        memory._taken[0] = 1
        tensor = memory.received(0, (10,), (1,))
    del tensor
    gc.collect()
    assert not memory._taken[0]


class Sender:
    """A worker's number; what comes from worker 0 is counted when it arrives in the main process."""

    change, arrived = Condition(), Value("i", 0)

    def __init__(self, worker):
        self.worker = worker

    def __reduce__(self):
        return Sender.arrive, (self.worker,)

    @staticmethod
    def arrive(worker):
        with Sender.change:
            Sender.arrived.value += not worker
            Sender.change.notify_all()
        return worker


def test_a_slow_worker_holds_nobody_back(shards):
    """While one of two workers loads three batches, the other loads nine; all come in order."""
    Sender.arrived.value = 0
    expected = first(stream(shards, 0), 14)
    loader = stream(shards, 2)
    loader.prefetch_factor = 4
    load, needed = loader.dataset._load, [5, 7, 9]  # more than if they took turns

    def slowed(requests):
        worker = torch.utils.data.get_worker_info().id
        if worker and needed:
            number = needed.pop(0)
            with Sender.change:
                assert Sender.change.wait_for(lambda: Sender.arrived.value >= number, PATIENCE)
        return load(requests) | {"key": [Sender(worker)] * len(requests)}

    loader.dataset._load = slowed
    batches = list(itertools.islice(loader, 14))
    assert all(torch.equal(b["image"], e) for b, e in zip(batches, expected, strict=True))
    # Each gets four at first, by turns; from then on one has always less to be done.
    assert [batch["key"][0] for batch in batches] == [0, 1] * 4 + [0] * 6
