"""Callbacks of every task: random state, data watch, what the terminal shows."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from vistok.core.console import say
from vistok.core.ranks import gather


class DataWatch(L.Callback):
    """Logs `data/wait_share`, the share of training time that was spent waiting for data.

    Args:
        file: for the images that cannot be used; a line each (key, cause, reason; by tabs).
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start the clock."""
        module.data.skipped.file = self.file
        module.data.skipped.record([])  # those met before
        self._restart(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Log the share since the last time, whenever metrics are logged."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = max(time.perf_counter() - self.begun, 1e-9)
            module.log("data/wait_share", (module.data.wait_seconds - self.waited) / seconds)
            self._restart(module)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Exclude the validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._restart(module)

    def _restart(self, module: Any) -> None:
        self.begun, self.waited = time.perf_counter(), module.data.wait_seconds


class StepClock(L.Callback):
    """Measures each optimizer step, and validations apart.

    Attributes:
        steps: (samples seen at its end, seconds) of each.
        validation_seconds: of the last validation.
        wait_share: share of the steps' time that was spent waiting for data.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []
        self.validation_seconds = 0.0
        self.wait_share = 0.0
        self._mark = self._waited = 0.0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start the clock."""
        self._step, self._waited = trainer.global_step, module.data.wait_seconds
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Take the time of a step."""
        if trainer.global_step == self._step:
            return
        self._step, now = trainer.global_step, time.perf_counter()
        self.steps.append((module.data.samples_seen, now - self._mark))
        spent = sum(seconds for _, seconds in self.steps)
        self.wait_share = min(1.0, (module.data.wait_seconds - self._waited) / max(spent, 1e-9))
        self._mark = now

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start the other clock."""
        self._mark = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Stop it."""
        now = time.perf_counter()
        self.validation_seconds, self._mark = now - self._mark, now


class RandomState(L.Callback):
    """Saves the random state of every rank and restores it right before the next training step.

    Lightning does not checkpoint it. Validation is fenced off, so that whether it ran between
    saving and the next step makes no difference.
    """

    def __init__(self) -> None:
        self.pending: dict[str, Any] | None = None
        self.fence: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict) -> None:
        """Store one state per rank."""
        # A resumed run that had reached its last step never restores what is pending.
        checkpoint["random_state"] = gather(self.pending or self.fence or random_state())

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict) -> None:
        """Keep this rank's state until training goes on."""
        states = checkpoint.get("random_state") or []
        if len(states) == trainer.world_size:
            self.pending = states[trainer.global_rank]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Let each rank draw its own, where numbers are not those of positions in the data."""
        if self.pending is None and trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Restore once."""
        if self.pending is not None:
            set_random_state(self.pending)
            self.pending = None

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        """Raise the fence."""
        self.fence = random_state()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Lower the fence."""
        if self.fence is not None:
            set_random_state(self.fence)
            self.fence = None


def random_state() -> dict[str, Any]:
    """Return the state of every random generator, as tensors and plain containers."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": list(random.getstate()),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `random_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class ValidationLine(L.Callback):
    """Prints one line at every validation, so that logs without a terminal show progress too."""

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print it."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loss = trainer.logged_metrics.get("loss/total", float("nan"))
        say(
            f"step {trainer.global_step}/{trainer.max_steps}  "
            f"samples {module.data.samples_seen}  loss {float(loss):.4f}  {module.headline()}"
        )
