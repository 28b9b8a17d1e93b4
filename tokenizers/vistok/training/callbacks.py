"""Callbacks: pictures, checkpoints, random state, codebook watch, what the terminal shows."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vistok.console import console, say
from vistok.distributed import world_size
from vistok.errors import CheckpointError
from vistok.evaluation.evaluator import Evaluator
from vistok.evaluation.pictures import comparison, save_png
from vistok.quantizers.usage import collapse_advice


class ReconstructionGrid(L.Callback):
    """At every validation, a PNG of fixed validation images above their reconstructions.

    Args:
        folder: where to write `step_000100.png`.
        num_images: how many images.
        scale: integer enlargement of small images.
    """

    def __init__(self, folder: Path, num_images: int, scale: int) -> None:
        self.folder = folder
        self.num_images = num_images
        self.scale = scale

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Draw with the averaged weights."""
        if trainer.sanity_checking or not self.num_images:
            return
        images = module.data.val_images(self.num_images)
        was_training = module.training
        module.eval()
        evaluator = Evaluator(module.tokenizer, metrics=[])
        if module.ema is None:
            reconstructions = evaluator.update(images)
        else:
            with module.ema.averaged():
                reconstructions = evaluator.update(images)
        module.train(was_training)
        sheet = comparison(images.cpu(), reconstructions.cpu())
        save_png(sheet, self.folder / f"step_{trainer.global_step:06d}.png", self.scale)


class CodebookWatch(L.Callback):
    """Logs codebook usage over windows of training steps, and warns when a codebook collapses.

    Args:
        every: length of a window in optimizer steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Close the window when it is full."""
        if trainer.global_step % self.every:
            return
        usage = module.tokenizer.quantizer.usage
        self._read(usage)
        for name, value in self.last.items():
            module.log(f"train/{name}", value)
        advice = collapse_advice(usage)
        if advice and trainer.is_global_zero:
            say(f"[yellow]step {trainer.global_step}: {advice}[/yellow]")
        usage.reset()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """A run that is shorter than a window has a usage too."""
        if not self.last:
            self._read(module.tokenizer.quantizer.usage)

    def _read(self, usage: Any) -> None:
        self.last = {name: value.item() for name, value in usage.compute().items()}


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
        state = self.fence or random_state()
        states: list[Any] = [state] * world_size()
        if world_size() > 1:
            dist.all_gather_object(states, state)
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict) -> None:
        """Keep this rank's state until training goes on."""
        states = checkpoint.get("random_state") or []
        if len(states) == trainer.world_size:
            self.pending = states[trainer.global_rank]

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
    """The state of every random generator, as tensors and plain containers."""
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
    """Inverse of `random_state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class StopAfterStep(L.Callback):
    """Ctrl-C ends the run after the step under way, so that what is saved is whole.

    A second one ends it at once. Loader workers inherit the handler and thereby outlive the first.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._last_step = 0
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signal; to be entered before the loaders start their processes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:  # also where Lightning ignores the signal from then on
            signal.signal(signal.SIGINT, previous)

    def _ask(self, *args: Any) -> None:
        if os.getpid() != self._process:
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("[yellow]stopping after this step; Ctrl-C again stops at once[/yellow]")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Stop all ranks together, never between accumulated batches."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            self.stopped = trainer.global_step < trainer.max_steps
            trainer.should_stop = True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name beside its place, syncs it, then renames it.

    Whatever goes wrong before the rename leaves the previous checkpoint as it was.
    """

    def save_checkpoint(self, checkpoint: dict, path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            kept = " (the previous checkpoint is whole)" if target.exists() else ""
            raise CheckpointError(f"{target}: could not be written, {reason}{kept}") from error


def checkpoint_callbacks(folder: Path, every: int) -> list[ModelCheckpoint]:
    """`last.ckpt` every `every` steps and `best.ckpt` by `val/psnr`."""
    common: dict[str, Any] = {
        "dirpath": folder,
        "save_top_k": 1,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    best = ModelCheckpoint(filename="best", monitor="val/psnr", mode="max", **common)
    last = ModelCheckpoint(filename="last", every_n_train_steps=every, **common)
    return [best, last]


class ContinuedCSVLogger(CSVLogger):
    """`metrics.csv` in the run folder; a resumed run goes on below the rows that still hold.

    Lightning's own logger deletes the file when a run starts in the same folder.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(str(folder.parent), name=folder.name, version="")
        self.first_step = first_step

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @property
    def experiment(self) -> Any:
        """The writer, which begins with the earlier rows."""
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            rows = _read_rows(path, self.first_step)
            super().experiment  # noqa: B018  (makes the writer, which removes the old file)
            if self._experiment is not None and rows:
                self._experiment.metrics = rows
                self._experiment.save()
        return super().experiment


def _read_rows(path: Path, first_step: int) -> list[dict[str, Any]]:
    import csv

    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    # A row that was cut short when the run ended has no step.
    return [r for r in rows if (r.get("step") or "").isdecimal() and int(r["step"]) <= first_step]


class ProgressBar(L.Callback):
    """One rich bar over all steps of the run, with loss, validation PSNR and images per second."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.started = 0.0
        self.first_sample = 0

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Open the bar."""
        self.started, self.first_sample = time.monotonic(), module.data.samples_seen
        if not console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("", total=trainer.max_steps, numbers="")
        self.progress.start()

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Move it."""
        if self.progress is None:
            return
        metrics = trainer.logged_metrics
        rate = (module.data.samples_seen - self.first_sample) / (time.monotonic() - self.started)
        numbers = [
            f"{name} {metrics[key]:.4g}"
            for key, name in (("loss/total", "loss"), ("val/psnr", "val psnr"))
            if key in metrics
        ]
        numbers.append(f"{rate:.0f} images/s")
        self.progress.update(self.task, completed=trainer.global_step, numbers="  ".join(numbers))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Close the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Close the bar."""
        self.on_train_end(trainer, module)


class ValidationLine(L.Callback):
    """Prints one line at every validation, so that logs without a terminal show progress too."""

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print it."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        results = module.val_results
        loss = trainer.logged_metrics.get("loss/total", float("nan"))
        say(
            f"step {trainer.global_step}/{trainer.max_steps}  "
            f"samples {module.data.samples_seen}  loss {float(loss):.4f}  "
            f"val psnr {results['psnr']:.2f} dB  usage {results['codebook_usage']:.0%}  "
            f"perplexity {results['perplexity']:.0f}"
        )
