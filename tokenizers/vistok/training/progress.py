"""What people see while a run trains: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vistok.core.console import console, say

#: Steps that are not timed, since libraries choose their ways in them, and those that are, before
#: the log says what to expect.
_COLD, _TIMED = 2, 5

#: Logged rows to a line of a log file.
_ROWS = 10


class ProgressBar(L.Callback):
    """Shows one bar over all steps, or in a log file a line every so many of them.

    After a few steps it says how long the rest takes. Validations are not part of images/s.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.first = 0  # step at which this call began
        self.since, self.sample = 0.0, 0  # where the rate is measured from
        self.paused = 0.0
        self.rate = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Open the bar."""
        self.first = trainer.global_step
        self._restart(module)
        if not console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("", total=trainer.max_steps, numbers="")
        self.progress.start()

    def _restart(self, module: Any) -> None:
        self.since, self.sample, self.paused = time.monotonic(), module.data.samples_seen, 0.0

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        """Stop the clock."""
        self._stopped = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Start it again."""
        self.paused += time.monotonic() - getattr(self, "_stopped", time.monotonic())

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Move it."""
        done = trainer.global_step - self.first
        if done == _COLD and self.rate == 0:
            self._restart(module)
        seconds = time.monotonic() - self.since - self.paused
        if seconds > 0 and module.data.samples_seen > self.sample:
            self.rate = (module.data.samples_seen - self.sample) / seconds
        left = trainer.max_steps - trainer.global_step
        if done == _COLD + _TIMED and left > _TIMED:
            took = self._left(module, left)
            say(f"{self.rate:.3g} images/s: the other {left} steps take about {took}")
        numbers = self._numbers(trainer, module)
        if self.progress is not None:
            self.progress.update(self.task, completed=trainer.global_step, numbers=numbers)
        elif trainer.global_step % (_ROWS * trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            say(
                f"step {trainer.global_step}/{trainer.max_steps}  {numbers}  "
                f"left {self._left(module, left)}"
            )

    def _left(self, module: Any, steps: int) -> str:
        seconds = steps * module.samples_per_step / self.rate if self.rate else 0
        return str(timedelta(seconds=round(seconds)))

    def _numbers(self, trainer: L.Trainer, module: Any) -> str:
        metrics = trainer.logged_metrics
        terms = [f"loss/{name}" for name in module.objective.terms]
        watched, _ = module.monitor
        shown = [("loss/total", "loss")]
        shown += [(key, key.removeprefix("loss/")) for key in terms[:2] if len(terms) > 1]
        shown += [(f"val/{watched}", f"val {watched}")]
        numbers = [f"{name} {float(metrics[key]):.4g}" for key, name in shown if key in metrics]
        return "  ".join([*numbers, f"{self.rate:.3g} images/s"])

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Close the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Close the bar."""
        self.on_train_end(trainer, module)
