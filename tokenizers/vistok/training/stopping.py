"""Ctrl-C and preemption: the run ends after the step under way, with its state saved.

Lightning stops wherever it is on Ctrl-C, and saves inside a signal's handler, which hangs when a
collective is under way.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L

from vistok.core.console import say
from vistok.core.errors import Preempted
from vistok.core.ranks import is_first_process, max_of_all

REQUEUE, INTERRUPT = 1, 2  # what is asked for; over the ranks the largest counts

#: What schedulers send before they take a machine away.
PREEMPTION_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class StopAfterStep(L.Callback):
    """Ends the run after the current step, on all ranks, so that the saved state is complete.

    Ctrl-C ends it for good, a second one at once, and a third one changes nothing. SIGTERM and
    SIGUSR1 end it to be continued; that they are repeated changes nothing. The handlers only take
    note: a collective or a save inside one could meet any other under way.

    Loader workers inherit the handlers. They outlive the first signal, for schedulers send it to
    every process and the step under way still needs them.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.reason = 0  # REQUEUE or INTERRUPT once the run was ended early
        self._step = 0
        self._raised = False
        self._process = os.getpid()

    @contextmanager
    def listening(self, *numbers: int) -> Iterator[None]:
        """Handle these signals; enter the context before the loaders start their processes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            handler = self._interrupt if number == signal.SIGINT else self._preempt
            signal.signal(number, handler)
        try:
            yield
        finally:  # also where Lightning ignores a signal from then on
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, *args: Any) -> None:
        if os.getpid() != self._process:
            return
        if self.asked == INTERRUPT:
            if self._raised:
                return  # the run is being closed, and further ones change nothing
            self._raised = True
            raise KeyboardInterrupt
        self.asked = INTERRUPT
        if is_first_process():
            say("[yellow]stopping after this step; Ctrl-C again stops at once[/yellow]")

    def _preempt(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:  # the next one is its parent's, who wants it gone
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return
        self.asked = self.asked or REQUEUE

    # ------------------------------------------------------------------ in the loop

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Begin to count."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Stop all ranks together, never between accumulated batches."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        asked = max_of_all(self.asked)
        if asked:
            if trainer.global_step < trainer.max_steps:
                self.reason = asked
            trainer.limit_val_batches = 0  # Lightning would validate once more
            trainer.should_stop = True

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """End a preempted run without waiting for a long validation, which the resumed run repeats.

        Raises:
            Preempted: if a rank was told to stop.
        """
        if max_of_all(self.asked) == REQUEUE:
            raise Preempted(
                "stopped during a validation; the last checkpoint is the one to resume from"
            )
