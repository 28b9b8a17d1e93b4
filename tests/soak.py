"""Kills a run again and again, then lets it end: `soak.py FOLDER KILLS RANKS WORD...`.

Importing takes longer than such a run; it is done once, and every attempt is a fork of that
process, made before there are any threads. Writes `killed/` and `whole/`, and prints one line of
JSON. An attempt dies when it has touched its files so many times, however long that takes; the
numbers are drawn from a generator with a fixed seed.
"""

import itertools
import json
import os
import random
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

import vistok.cli
import vistok.training.run
from vistok.checkpoints import write as checkpoints
from vistok.checkpoints.seals import read_seal
from vistok.training.metrics_file import whole_rows

TOUCHES = {"open", "os.link", "os.remove", "os.rename"}


def attempt(
    words: list[str], run: Path, log: Path, mortal: tuple[int, bool] | None = None, ranks: int = 1
) -> int:
    """Run a command in a separate process, or one for each rank; return the first's exit code.

    With `mortal` (n, pieces) it is killed at the n-th time that it touches a file of its run;
    each piece that goes into a checkpoint counts, too, if `pieces`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = []
    for rank in reversed(range(ranks)):
        process = os.fork()
        if not process:
            _be(rank, ranks, port, words, run, log, mortal)
        others.append(process)
    code = os.waitstatus_to_exitcode(os.waitpid(others.pop(), 0)[1])
    for process in others:
        if code:
            os.kill(process, signal.SIGKILL)  # as torchrun would
        os.waitpid(process, 0)
    return code


def _be(rank, ranks, port, words, run, log, mortal):
    """Be a rank; does not return."""
    if ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "soak"}
        os.environ.update({name: str(value) for name, value in places.items()})
        rank_zero_only.rank = rank
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if mortal and rank == 0:
        die_at(run, *mortal)
    os._exit(vistok.cli.train([*words, f"hydra.run.dir={run}"]))


def die_at(run: Path, number: int, pieces: bool) -> None:
    """Let this process die at the n-th touch."""
    touches = itertools.count(1)

    def touch() -> None:
        if next(touches) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, details: tuple) -> None:
        if event in TOUCHES and str(details[0]).startswith(str(run)):
            touch()

    sys.addaudithook(watch)
    if pieces:
        real = checkpoints.Summed.write

        def write(self, data):
            touch()
            return real(self, data)

        checkpoints.Summed.write = write


def last_step(run: Path) -> int:
    """Step of the newest checkpoint."""
    path = run / "checkpoints" / "last.ckpt"
    return (read_seal(path) or ("", 0))[1] if path.exists() else 0


def logged_step(run: Path) -> int:
    """Last step whose loss was written."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return max((int(row["step"]) for row, _ in whole_rows(file)), default=0)


def main(folder: Path, kills: int, ranks: int, words: list[str]) -> None:
    """Kill, then finish; and run once without any kill."""
    torch.set_num_threads(1)
    moments = random.Random(0)
    run, log = folder / "killed", folder / "log.txt"
    report = {"kills": kills, "in_a_write": 0, "while_starting": 0, "steps_lost": 0}
    for number in range(kills):
        before = last_step(run)
        # Every other one dies between the pieces of a checkpoint, more likely than not.
        mortal = (moments.randint(1, 4000), True) if number % 2 else (moments.randint(1, 60), False)
        workers = f"data.num_workers={number % 3 if number % 4 == 3 else 0}"
        code = attempt([*words, workers], run, log, mortal, ranks)
        if code != -signal.SIGKILL:
            sys.exit(f"ended by itself with {code} after {number} kills")
        report["in_a_write"] += bool(list(run.glob("checkpoints/*.tmp")))
        report["while_starting"] += last_step(run) == before
        report["steps_lost"] += max(0, logged_step(run) - last_step(run))
    report["at_step"] = last_step(run)
    for name in ("killed", "whole"):
        if code := attempt(words, folder / name, log, None, ranks):
            sys.exit(f"{name} failed with {code}")
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
