"""A long stream needs no more memory than a short one, in the main process and in the workers."""

import gc
import itertools
import os
import tracemalloc
from pathlib import Path

import pytest

from vistok.data.datamodule import VistokDataModule

WARM, LONG = 150, 1200  # batches: 33 and 267 epochs of the 36 training images


def resident(process):
    """Bytes that a process has in memory of its own; what it shares with others is left out."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def stream(shards, workers):
    data = VistokDataModule(
        "shards", f"{shards}/*.tar", image_size=16, batch_size=8, num_workers=workers
    )
    data.setup("fit")
    return data, data.train_dataloader()


@pytest.mark.slow
def test_the_objects_of_a_long_stream_do_not_add_up(shards):
    data, loader = stream(shards, 0)
    batches = iter(loader)
    tracemalloc.start()
    try:
        sizes = []
        for count in (WARM, LONG):
            for _ in itertools.islice(batches, count):
                data.advance()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # A kept label or key would be 50 bytes for each of 9600 images.
    assert sizes[1] - sizes[0] < 100_000, sizes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_no_process_of_a_long_stream_grows(shards):
    data, loader = stream(shards, 2)
    batches = iter(loader)
    sizes = []
    for count in (WARM, LONG):
        for _ in itertools.islice(batches, count):
            data.advance()
        gc.collect()
        workers = [worker.pid for worker in loader._iterator._workers]
        sizes.append([resident(process) for process in (os.getpid(), *workers)])
    growth = [after - before for before, after in zip(*sizes, strict=True)]
    # 9600 images of 768 bytes; allocators may take some pages more.
    assert len(growth) == 3 and max(growth) < 4_000_000, growth
    del batches
