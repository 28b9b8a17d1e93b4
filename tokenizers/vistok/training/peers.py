"""The other ranks of a job: who ended, how, and what to try."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from vistok.core import ranks
from vistok.core.run_lock import is_running, start_of

_ADVICE = (
    "most often because the machine's memory ran out (dmesg tells): try a smaller data.batch_size, "
    "fewer data.num_workers or fewer trainer.devices, then resume"
)


class Peers:
    """Remembers the processes of the ranks, and says which of them is gone.

    Args:
        patience: seconds to wait for a process to be gone.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.patience = patience
        self.processes: list[tuple[str, int, str | None]] = []
        self.children: Sequence[subprocess.Popen[bytes]] = ()

    def meet(self, children: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        """Exchange process numbers; every rank must call it.

        Args:
            children: ranks that this process started: 1, 2, ...
        """
        own = (socket.gethostname(), os.getpid(), start_of(os.getpid()))
        self.processes = ranks.gather(own)
        self.children = children

    def report(self) -> str:
        """Return a line on the rank that ended, as far as it shows from here."""
        end = time.monotonic() + self.patience
        while True:
            gone = self._gone()  # before their codes: one that is gone has its code
            for number, child in enumerate(self.children, start=1):
                code = child.poll()
                if code is not None and code < 0:
                    return killed(number, -code)
            if gone or time.monotonic() > end:
                break
            time.sleep(0.1)
        if gone:
            names = " and ".join(f"rank {rank}" for rank in gone)
            return (
                f"another rank ended: {names}; if it printed no error of its own, it was killed "
                f"from outside, {_ADVICE}"
            )
        return (
            "another rank ended, or did not answer for trainer.timeout seconds; see its own error, "
            f"or if it printed none, it may have been killed from outside, {_ADVICE}"
        )

    def _gone(self) -> list[int]:
        host = socket.gethostname()
        return [
            rank
            for rank, (place, pid, begun) in enumerate(self.processes)
            if place == host and not (is_running(pid) and start_of(pid) == begun)
        ]


def killed(rank: int, number: int) -> str:
    """Return a line on a rank that a signal ended."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = f"from outside, {_ADVICE}" if number == signal.SIGKILL else "see above for its own words"
    return f"rank {rank} was ended by {name}, {why}"


class ChildWatch(threading.Thread):
    """Ends the job within seconds when a rank that this process started has ended badly.

    Lightning's own watch kills this process too, without a word.

    Args:
        children: ranks 1, 2, ...
        period: seconds between two looks.
        grace: seconds for this process to end by itself, since a collective fails.
    """

    def __init__(
        self, children: Sequence[subprocess.Popen[bytes]], period: float = 0.5, grace: float = 6.0
    ) -> None:
        super().__init__(daemon=True, name="child watch")
        self.children = children
        self.period = period
        self.grace = grace

    def run(self) -> None:
        """Look until all have ended."""
        while True:
            time.sleep(self.period)
            codes = [child.poll() for child in self.children]
            bad = [(rank, code) for rank, code in enumerate(codes, start=1) if code]
            if bad:
                return self._end(*bad[0])
            if all(code == 0 for code in codes):
                return

    def _end(self, rank: int, code: int) -> None:
        time.sleep(self.grace)
        for child in self.children:
            if child.poll() is None:
                child.kill()
        said = killed(rank, -code) if code < 0 else f"rank {rank} ended with code {code}"
        print(f"error: {said}", file=sys.stderr, flush=True)
        os._exit(1)


def end_with_parent(finished: threading.Event) -> None:
    """Let this process, which another one started as a further rank, not outlive it by long.

    Args:
        finished: is set when there is nothing left to train.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            if finished.wait(1):
                return
        if finished.wait(6):  # a collective that fails says more
            return
        print("error: rank 0 ended, so this rank ends as well", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
