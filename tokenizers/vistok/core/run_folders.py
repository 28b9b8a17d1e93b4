"""Run folders: each belongs to one run, and nothing in it is replaced unasked. Light."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vistok.core.errors import ConfigError, VistokError
from vistok.core.run_lock import RunLock
from vistok.core.terminal import counted, show

#: What a run writes into its folder. Loggers of others put files of new names next to theirs.
RUN_FILES = (
    "checkpoints",
    "metrics.jsonl",
    "metrics.csv",
    "summary.json",
    "pictures",
    "config.yaml",
    "versions.json",
    "command.txt",
    "skipped.tsv",
)


def leads() -> bool:
    """Return whether this process is the first of its job, before a process group exists."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def claim_new(folder: Path) -> Path:
    """Make a folder that was not there, by this name or with `_2`, `_3`, ... behind it.

    No two processes can both make one, so two runs of one second have two folders.

    Raises:
        VistokError: if it cannot be made.
    """
    number, candidate = 1, folder
    _make(folder.parent)
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}_{number}")
        except OSError as error:
            raise _refused(candidate, error) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> VistokError:
    where = error.filename or folder
    return VistokError(f"{where}: the run folder cannot be made there: {error.strerror}")


@contextmanager
def held(folder: Path, is_new: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Hold a run folder while a run is made or goes on in it; an empty one does not outlive it.

    Of a job of several processes the first one holds it for all.

    Args:
        folder: made if it is not there.
        is_new: whether a run begins, which takes a folder without one.
        overwrite: let a new run replace the one that is there.

    Raises:
        VistokError: if another process trains in the folder, or it holds a run.
    """
    if not leads():
        yield
        return
    _make(folder)
    if not os.access(folder, os.W_OK):
        raise VistokError(f"{folder}: read-only; a run must be able to write to its folder")
    if is_new and not overwrite:
        refuse_run(folder)
    lock = RunLock(folder, show)
    lock.acquire()
    try:
        if is_new and not overwrite:  # it may have begun while we waited
            refuse_run(folder)
        yield
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # works if it is empty


def refuse_run(folder: Path) -> None:
    """Raise if a folder holds a run, or files of the names that one would write.

    Raises:
        ConfigError: saying what is there, and how to continue or to replace it.
    """
    there = [name for name in RUN_FILES if _is_there(folder / name)]
    if not there:
        return
    saved = len(list((folder / "checkpoints").glob("*.ckpt")))
    found = f"a run with {counted(saved, 'checkpoint')}" if saved else f"{there[0]} already"
    resume = f"resume={folder} continues it, " if saved else ""
    raise ConfigError(
        f"hydra.run.dir={folder}: holds {found}; {resume}overwrite=true replaces it, or choose "
        "another folder"
    )


def remove_run(folder: Path) -> None:
    """Remove the files of the run in a folder, and nothing else."""
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            aside = Path(tempfile.mkdtemp(prefix=".replaced.", dir=folder))
            os.replace(path, aside / name)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() or path.is_symlink()
