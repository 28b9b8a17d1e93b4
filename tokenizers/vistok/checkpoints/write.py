"""Write checkpoints whole or not at all, and keep the last few."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vistok.checkpoints.seals import seal, seal_of
from vistok.core.errors import CheckpointError
from vistok.core.memory import in_units

LAST, BEST = "last.ckpt", "best.ckpt"

TEMPORARY = ".tmp"  # ends the names of what is being written, or removed


def step_of(checkpoint: dict) -> int:
    """Return the number of optimizer steps that led to a checkpoint."""
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
    """Give a complete file or folder its name, and keep or remove the one that had it."""
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


def failure(error: Exception, target: Path, needed: int = 0) -> CheckpointError:
    """Return the error to raise if `target` could not be written.

    Args:
        error: what went wrong; torch tells of a full disk as an error of its zip writer.
        target: of the checkpoint.
        needed: bytes that it takes; 0 if that is unknown.
    """
    system = _system_error(error)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if system is not None and system.strerror:
        reason = system.strerror
    free = _free_bytes(target.parent)
    full = system is not None and system.errno in (errno.ENOSPC, errno.EDQUOT)
    if needed and (full or (free is not None and free < needed)):
        there = "" if free is None else f" and {in_units(free)} are free"
        reason = f"{reason} (disk full: it takes {in_units(needed)}{there})"
    kept = ""
    before = target if _exists(target) else target.with_name(LAST)
    if _exists(before):
        sealed = seal_of(before)
        step = f" (step {sealed[1]})" if sealed else ""
        kept = f"; the previous checkpoint is intact{step}: resume from it when there is room"
    told = CheckpointError(f"{target}: could not be written: {reason}{kept}")
    told.__cause__ = error
    return told


def size_of(content: Any) -> int:
    """Return the bytes of all tensors in the content of a checkpoint."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(size_of, content.values()))
    return sum(map(size_of, content)) if isinstance(content, (list, tuple)) else 0


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


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
    """Return a copy in main memory; tensors of a GPU are copied to pinned memory."""
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
    """Keep the present `last.ckpt` as `step_*.ckpt` before that of `step` takes its place.

    Afterwards there are `keep` - 1 of these at most. Those of `step` and later belong to a future
    that a resume from an older checkpoint has given up.
    """
    sealed = seal_of(last)
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


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
