"""Checkpoints during training: written in the background, the last few and the best.

Lightning's writers do not sync a file before it takes the place of the one before, and keep no
checksum by which a resume could tell a damaged one and pass it over.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from vistok.checkpoints.migrate import migrate_checkpoint
from vistok.checkpoints.write import (
    BEST,
    LAST,
    TEMPORARY,
    failure,
    publish,
    remove,
    size_of,
    snapshot,
    step_of,
    write_sealed,
)
from vistok.core.errors import CheckpointError
from vistok.core.ranks import max_of_all
from vistok.training.metrics_file import MetricsFile


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints in a thread while training goes on.

    `save_checkpoint` copies everything to main memory, which is all that training waits for. One
    write is under way at most; the next one waits for it. A write goes to a temporary name, is
    synced, and renamed; whatever goes wrong before the rename leaves the previous checkpoint as
    it was. An error of the thread is raised by the next `check`, `join` or `save_checkpoint`.

    Args:
        keep_last: how many of the last checkpoints to keep, `last.ckpt` included; at least 1.
        background: False writes in the caller's thread.
    """

    def __init__(self, keep_last: int = 2, background: bool = True) -> None:
        self.keep_last = keep_last
        self.background = background
        self.stall = 0.0  # seconds that the last save held training up
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save_checkpoint(self, checkpoint: dict, path: Any, storage_options: Any = None) -> None:
        """Begin to write `checkpoint` to `path`."""
        started = time.perf_counter()
        self.join()
        self._start(checkpoint, Path(path))
        if not self.background:
            self.join()
        self.stall = time.perf_counter() - started

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Return the content of a file, of an older version too."""
        return migrate_checkpoint(super().load_checkpoint(path, *args, **options), path)

    def _start(self, checkpoint: dict, target: Path) -> None:
        if self.background:
            arguments = (snapshot(checkpoint), target)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(checkpoint, target)

    @property
    def busy(self) -> bool:
        """Return whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Give what has been written its name, if all ranks have; every rank must call this."""

    def join(self) -> None:
        """Wait until nothing is being written; raises what went wrong."""
        self.teardown()
        self.check()

    def teardown(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: dict, target: Path) -> None:
        temporary = target.with_name(target.name + TEMPORARY)
        try:
            write_sealed(checkpoint, temporary)
            publish(temporary, target, step_of(checkpoint), self.keep_last)
        except Exception as error:  # a thread's exception would only be printed
            self._error = failure(error, target, size_of(checkpoint))
            with suppress(OSError):  # the folder may let nothing be removed either
                temporary.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """`last.ckpt` every so many steps, and `best.ckpt` at validations that beat all before.

    Args:
        folder: where to.
        every: optimizer steps between writes of `last.ckpt`.
        writer: the trainer's.
    """

    def __init__(self, folder: Path, every: int, writer: CheckpointWriter) -> None:
        self.folder = folder
        self.every = every
        self.writer = writer
        self.best = float("-inf")
        self._step = 0

    def save(self, trainer: L.Trainer, name: str = LAST) -> None:
        """Save the present state; every rank must call this."""
        trainer.save_checkpoint(self.folder / name)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Begin to count, and make sure that all ranks begin at one step."""
        self._step = trainer.global_step
        if max_of_all(self._step) != -max_of_all(-self._step):
            raise CheckpointError(
                f"{self.folder}: the ranks resume at different steps (here {self._step}); the run "
                "folder must be one that every node sees"
            )
        self._remove_torn_files()

    @rank_zero_only
    def _remove_torn_files(self) -> None:
        for path in self.folder.glob(f"*{TEMPORARY}"):  # of a process that was killed
            remove(path)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Save after the step, never between accumulated batches."""
        self.writer.check()
        if trainer.global_step == self._step:
            return
        self.writer.settle()
        self._step = trainer.global_step
        # While steps are skipped the state may be what makes them so, and the last one is not.
        if self._step % self.every == 0 and module.guard.proven:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.log_early(trainer)
            self.save(trainer)

    def on_validation_batch_end(self, *args: Any) -> None:
        """A long validation holds nothing up."""
        self.writer.settle()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save what is best."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.save_if_best(trainer, module)

    def save_if_best(self, trainer: L.Trainer, module: Any) -> bool:
        """Save `best.ckpt` if the last validation beats all before, and return whether it does.

        Every rank must call this.
        """
        name, mode = module.monitor
        score = module.results[name] if mode == "max" else -module.results[name]
        if not score > self.best:  # nor where it is NaN
            return False
        self.best = score
        self.save(trainer, BEST)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far, the larger the better."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.best = float(state_dict["best"])
