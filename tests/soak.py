"""Kills a run again and again, then lets it end: `soak.py FOLDER KILLS WORD...`.

Importing takes longer than such a run; it is done once, and every attempt is a fork of that
process, made before there are any threads. Writes `killed/` and `whole/`, and prints one line of
JSON. The moments are drawn from a generator with a fixed seed, but what they hit depends on the
machine.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))

import torch

import vistok.cli
import vistok.tasks.run
from vistok.checkpoints import write as checkpoints
from vistok.checkpoints.seals import read_seal
from vistok.training.metrics_file import whole_rows

WRITE_DELAY = 0.002  # seconds for each piece of a checkpoint


def attempt(words: list[str], log: Path, slow: bool) -> int:
    """Start a run; its process."""
    process = os.fork()
    if process:
        return process
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if slow:
        real = checkpoints.Summed.write

        def write(self, data):
            time.sleep(WRITE_DELAY)
            return real(self, data)

        checkpoints.Summed.write = write
    os._exit(vistok.cli.train(words))


def ended(process: int) -> int | None:
    """Exit code, if it has ended."""
    pid, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


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


def main(folder: Path, kills: int, words: list[str]) -> None:
    """Kill, then finish; and run once without any kill."""
    torch.set_num_threads(1)
    random.seed(0)
    run, log = folder / "killed", folder / "log.txt"
    report = {"kills": 0, "in_a_write": 0, "while_starting": 0, "steps_lost": 0}
    started = time.monotonic()
    while report["kills"] < kills:
        before = last_step(run)
        process = attempt([*words, f"hydra.run.dir={run}"], log, slow=True)
        # Some die while they start, the others some time after they have saved something.
        deadline = time.monotonic() + random.uniform(0.1, 2.0)
        if random.random() < 0.8:
            while last_step(run) == before and ended_early(process) is None:
                time.sleep(0.005)
            deadline = time.monotonic() + random.uniform(0, 0.4)
        while time.monotonic() < deadline:
            time.sleep(0.001)
        code = ended(process)
        if code is not None:
            sys.exit(f"ended by itself with {code} after {report['kills']} kills")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        report["kills"] += 1
        report["in_a_write"] += bool(list(run.glob("checkpoints/*.tmp")))
        report["while_starting"] += last_step(run) == before
        report["steps_lost"] += max(0, logged_step(run) - last_step(run))
    report |= {"at_step": last_step(run), "seconds": round(time.monotonic() - started)}
    for name in ("killed", "whole"):
        process = attempt([*words, f"hydra.run.dir={folder / name}"], log, slow=False)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{name} failed with {os.waitstatus_to_exitcode(status)}")
    print(json.dumps(report))


def ended_early(process: int) -> None:
    """Stop everything if the process has ended by itself."""
    code = ended(process)
    if code is not None:
        sys.exit(f"an attempt ended by itself with {code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
