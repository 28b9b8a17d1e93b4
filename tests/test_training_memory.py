"""Memory that is freed stays with a process that trains on a CPU."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from vistok.training.memory import keep_freed_memory

assert sys.argv[1] == "default" or keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(1 << 22) for _ in range(10)]  # 16 MiB each
    del pieces
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_the_next_step_takes_what_the_last_one_freed():
    """By default at least one of ten pieces, 4096 pages or 8 huge ones, comes anew each time."""

    def faults(which):
        command = [sys.executable, "-c", CODE, which]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    kept, given_back = faults("keep"), faults("default")
    assert kept < 200 and 2 * kept < given_back
