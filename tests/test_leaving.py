"""A rank whose work is done ends with its exit code, whatever the threads of gloo still do."""

import os
import subprocess
import sys

import pytest

from helpers import PATIENCE, ROOT

#: Leaves collectives under way, so that gloo frees their tensors while the process ends.
RANK = """
import sys
from vistok import cli
from vistok.core.leaving import ends_with
import atexit, torch, torch.distributed as dist

torch.set_num_threads(1)
atexit.register(print, "what was registered later runs before the end")
code, rank, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
print("not flushed", end=" ")
for _ in range(4):
    dist.all_reduce(torch.ones(3_000_000), async_op=True)
sys.exit(ends_with(int(code)))
"""


PATHS = {"PYTHONPATH": str(ROOT / "tokenizers")}


def start_rank(code, rank, store):
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(code), str(rank), str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **PATHS},
    )


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("code", [0, 75])
def test_ranks_end_with_their_code_while_gloo_is_busy(code, tmp_path):
    """With an interpreter that is taken apart, about one of five such pairs ends with SIGABRT."""
    for number in range(2):
        pair = [start_rank(code, rank, tmp_path / f"store{number}") for rank in range(2)]
        for process in pair:
            out, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == code, out
            assert "not flushed" in out and "runs before the end" in out


def test_one_process_ends_as_ever():
    """Only ranks leave early: code that others registered to run at the end runs."""
    words = (
        "from vistok.core.leaving import ends_with; import sys, atexit; ends_with(3); sys.exit(4)"
    )
    done = subprocess.run([sys.executable, "-c", words], env={**os.environ, **PATHS})
    assert done.returncode == 4
