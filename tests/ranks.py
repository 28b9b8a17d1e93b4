"""Training jobs in processes of their own, and of several ranks.

`start` starts a job as a user does. `fork` starts one as torchrun does, with each rank forked from
one process that has everything imported: importing takes far longer than these tiny runs. Tests
whose matter is the launcher use `start`; for all others a forked rank is as good.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest

from helpers import PATIENCE, ROOT

#: Words of a job of two ranks with the global batch of TINY.
TWO = ["trainer.devices=2", "data.batch_size=2"]

_IMPORTED = ["ranks", "hydra", "vistok.cli", "vistok.training.run", "vistok.tasks.reconstruction"]
_FORKS = multiprocessing.get_context("forkserver")


def start(words, *launcher, **environment):
    """Start `train.py` with these words."""
    return start_command(
        [*(launcher or (sys.executable,)), str(ROOT / "train.py"), *words], **environment
    )


def start_command(command, **environment):
    """Start a command whose output is kept."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK")}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,  # so that a test that fails leaves nothing behind
    )


def fork(words, ranks=2):
    """Start a training of several ranks in the working folder."""
    _start_server()
    return Forked(words, ranks)


def ended(job):
    """Exit code, output and errors; fails if the job hangs."""
    try:
        out, err = job.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        job.kill() if isinstance(job, Forked) else os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        pytest.fail(f"the job hangs\n{out}\n{err}")
    return job.returncode, out, err


def assert_ended(job, code):
    """The output of a job that must end with this exit code."""
    ended_with, out, err = ended(job)
    assert ended_with == code, out + err
    return out


class Forked:
    """A job of forked ranks; `returncode` is that of rank 0, else of the first that failed."""

    def __init__(self, words, ranks):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory()
        self.ranks = [
            _FORKS.Process(target=_run, args=(words, rank, ranks, port, self.folder.name))
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    def communicate(self, timeout=None):
        """Wait for all ranks; output and errors of all of them."""
        first, *others = self.ranks
        first.join(timeout)
        if first.exitcode not in (None, 0, 75):  # then torchrun would end the others, too
            self.kill()
        for process in others:
            process.join(timeout)
        codes = [process.exitcode for process in self.ranks]
        if None in codes:
            raise subprocess.TimeoutExpired("forked ranks", timeout)
        self.returncode = next((code for code in codes if code), 0)
        files = sorted(Path(self.folder.name).iterdir())
        return tuple(
            "".join(path.read_text() for path in files if path.suffix == suffix)
            for suffix in (".out", ".err")
        )

    def kill(self):
        """End all ranks at once."""
        for process in self.ranks:
            process.kill()


@cache
def _start_server():
    """Start the process that ranks are forked from."""
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1")
    try:
        forkserver.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(words, rank, ranks, port, folder):
    """Run as one rank of a job."""
    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{suffix}", os.O_WRONLY | os.O_CREAT), descriptor)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in places.items()})
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from vistok.cli import train

    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # read from the environment when it was imported
    sys.exit(train(words))
