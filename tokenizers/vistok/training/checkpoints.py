"""Checkpoints: written whole or not at all, beside the training, the last few and the best."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from vistok.checkpoint import check_seal, read_checkpoint, read_seal, seal
from vistok.console import say
from vistok.distributed import is_first_process, max_of_all
from vistok.errors import CheckpointError

LAST, BEST = "last.ckpt", "best.ckpt"
TEMPORARY = ".tmp"  # ends the names of what is being written, or removed


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

    def _start(self, checkpoint: dict, target: Path) -> None:
        if self.background:
            arguments = (snapshot(checkpoint), target)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(checkpoint, target)

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
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
            self._error = failure(error, target)
            with suppress(OSError):  # the folder may let nothing be removed either
                temporary.unlink(missing_ok=True)


def step_of(checkpoint: dict) -> int:
    """Optimizer steps that led to a checkpoint."""
    return int(checkpoint.get("global_step", 0))


def write_sealed(content: dict, path: Path) -> None:
    """Write a file with its seal, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        summed = Summed(file)
        torch.save(content, summed)  # pyright: ignore[reportArgumentType]
        file.write(seal(summed.sha.hexdigest(), step_of(content)))
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, target: Path, step: int, keep_last: int) -> None:
    """Give a file or folder that is whole its name; what bore it before is kept or removed."""
    if target.name == LAST:
        keep_previous(target, step, keep_last)
    if target.is_dir():  # a folder cannot take the place of another
        aside = target.with_name(f"{target.name}.old{TEMPORARY}")
        remove(aside)
        os.replace(target, aside)
        os.replace(temporary, target)
        remove(aside)
    else:
        os.replace(temporary, target)
    sync_folder(target.parent)


def failure(error: Exception, target: Path) -> CheckpointError:
    """What to raise if `target` could not be written."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    kept = " (the previous checkpoint is whole)" if _exists(target) else ""
    told = CheckpointError(f"{target}: could not be written, {reason}{kept}")
    told.__cause__ = error
    return told


class Summed:
    """A file for `torch.save` that computes the digest of what passes through.

    Args:
        file: to write to.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write on."""
        self.sha.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Pass it on."""
        self.file.flush()


def snapshot(content: Any) -> Any:
    """A copy in main memory: tensors cloned (pinned, if they come from a GPU), containers anew."""
    copies: dict[tuple, Tensor] = {}  # tensors that share their memory stay one

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage().data_ptr()
            key = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
            if key not in copies or not storage:
                copies[key] = _copy(value.detach())
            return copies[key]
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(walk(item) for item in value)
        return value

    copied = walk(content)
    if any(tensor.is_pinned() for tensor in copies.values()):
        torch.cuda.synchronize()
    return copied


def _copy(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def keep_previous(last: Path, step: int, keep: int) -> None:
    """Before `last.ckpt` of `step` takes its place: the present one stays as `step_*.ckpt`.

    Afterwards there are `keep` - 1 of these at most. Those of `step` and later belong to a future
    that a resume from an older checkpoint has given up.
    """
    sealed = _seal_of(last)
    if sealed is not None and sealed[1] < step and keep > 1:
        aside = last.with_name(f"step_{sealed[1]:08d}.ckpt")
        remove(aside)
        try:
            os.link(last, aside)
        except OSError:  # a folder, or a file system without hard links
            os.replace(last, aside)
    older = {int(path.stem[5:]): path for path in last.parent.glob("step_*.ckpt")}
    kept = sorted((number for number in older if number < step), reverse=True)[: keep - 1]
    for number, path in older.items():
        if number not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, if there is one; a folder first loses its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(TEMPORARY):
        going = path.with_name(path.name + ".gone" + TEMPORARY)
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        path = going
    shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as lasting as the files."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal_of(path: Path) -> tuple[str, int] | None:
    try:
        return read_seal(path)
    except (OSError, CheckpointError):
        return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that is whole; None if there is no file at all.

    Damaged ones are passed over, with one line for each.

    Raises:
        CheckpointError: if there are checkpoints and none is whole.
    """
    problems = []
    for path in sorted((run / "checkpoints").glob("*.ckpt"), key=_age, reverse=True):
        try:
            if read_seal(path) is None:
                read_checkpoint(path)  # only reading it shows
            check_seal(path)
            return path
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            if is_first_process():
                say(f"[yellow]{error}; looking for an older one[/yellow]")
    if problems:
        raise CheckpointError(f"{run}: no checkpoint is whole; {problems[0]}")
    return None


def _age(path: Path) -> tuple[float, str]:
    """Sort key: `last.ckpt` is the newest, the others go by their step."""
    if path.name == "last.ckpt":
        return float("inf"), ""
    if number := re.fullmatch(r"step_(\d+)", path.stem):
        return float(number[1]), path.name
    sealed = _seal_of(path)
    return (-1.0 if sealed is None else sealed[1]), path.name


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
        if self._step % self.every == 0:
            for logger in trainer.loggers:
                if hasattr(logger, "log_early"):
                    logger.log_early(trainer)  # pyright: ignore[reportAttributeAccessIssue]
            self.save(trainer)

    def on_validation_batch_end(self, *args: Any) -> None:
        """A long validation holds nothing up."""
        self.writer.settle()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save what is best."""
        psnr = module.val_results["psnr"]
        if trainer.state.fn == TrainerFn.FITTING and psnr > self.best:
            self.best = psnr
            self.save(trainer, BEST)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.best = float(state_dict["best"])
