"""The progress of bulk work: images per second, the share of waiting, the time left."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vistok.core.console import say
from vistok.core.terminal import counted
from vistok.export.tokenize_units import Progress as Done

_SECONDS_PER_LINE = 30


class Bar:
    """A bar on a terminal, or a line every half minute in a log; a context manager.

    Args:
        units: that there are.
        there: of these, done before.
    """

    def __init__(self, units: int, there: int = 0) -> None:
        self.units, self.there = units, there
        self._begun = time.perf_counter()
        self._line = self._begun
        self._bar: Progress | None = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty() and sys.stdout.isatty():
            columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), transient=True)
            self._bar.start()
            self._bar.add_task("", total=self.units, completed=self.there, text="")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: Done) -> None:
        """Show what was done since the beginning."""
        now = time.perf_counter()
        text = self.text(done, now - self._begun)
        if self._bar is not None:
            task = self._bar.tasks[0].id
            self._bar.update(task, completed=self.there + done.units, text=text)
        elif now - self._line > _SECONDS_PER_LINE:
            self._line = now
            say(text)

    def text(self, done: Done, elapsed: float) -> str:
        """Return shards, rate, waiting and time left in words."""
        finished = self.there + done.units
        rate = done.images / elapsed if elapsed > 0 else 0.0
        waiting = 100 * done.waited / done.seconds if done.seconds > 0 else 0.0
        words = [f"{finished} of {counted(self.units, 'shard')}", f"{rate:.1f} images/s"]
        words.append(f"{min(waiting, 100):.0f} % waiting for data")
        if done.units and elapsed > 0:
            left = (self.units - finished) * elapsed / done.units
            words.append(f"{_time(left)} left")
        return ", ".join(words)


def _time(seconds: float) -> str:
    minutes, hours = divmod(int(seconds) // 60, 60)[::-1]
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{int(seconds) % 60:02d} min"


_FIELDS = ("images", "units", "seconds", "waited")


class Counters:
    """Progress of several processes, in memory that they share.

    Args:
        context: of multiprocessing.
        processes: how many there will be.
    """

    def __init__(self, context: Any, processes: int) -> None:
        self.values = context.Array("d", len(_FIELDS) * processes)
        self._error = context.Array(ctypes.c_char, 4096)

    def told(self, place: int) -> Callable[[Done], None]:
        """Return what a worker tells its progress to."""

        def tell(done: Done) -> None:
            for number, name in enumerate(_FIELDS):
                self.values[place * len(_FIELDS) + number] = getattr(done, name)

        return tell

    def total(self) -> Done:
        """Return the progress of all; seconds are those of all processes together."""
        sums = [sum(self.values[number :: len(_FIELDS)]) for number in range(len(_FIELDS))]
        return Done(int(sums[0]), int(sums[1]), sums[2], sums[3])

    def fail(self, message: str) -> None:
        """Keep the first error."""
        with self._error.get_lock():
            if not self._error.value:
                self._error.value = message.encode("utf-8", "replace")[:4000]

    def error(self) -> str:
        """Return the first error; empty without one."""
        return self._error.value.decode("utf-8", "replace")
