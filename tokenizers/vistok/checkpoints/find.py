"""Find the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from vistok.checkpoints.seals import is_checkpoint
from vistok.core.errors import CheckpointError
from vistok.core.files import what_is_there


def find_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """Return the checkpoint of a run folder (best or last), or `path` itself if it is one.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path
    if not path.exists():
        raise CheckpointError(f"{path}: no such run, export or checkpoint{what_is_there(path)}")
    names = ("best.ckpt", "last.ckpt") if prefer == "best" else ("last.ckpt", "best.ckpt")
    for name in names:
        if is_checkpoint(path / "checkpoints" / name):
            return path / "checkpoints" / name
    raise CheckpointError(
        f"{path}: neither a run nor an export; expected checkpoints/last.ckpt or "
        "model.safetensors in it"
    )


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to."""
    inside = checkpoint.parent.name == "checkpoints"
    return checkpoint.parent.parent if inside else checkpoint.parent


def find_checkpoint_or_export(path: str) -> Path:
    """Return `path` if it is an export folder, else the checkpoint in it."""
    folder = Path(path)
    return folder if (folder / "model.safetensors").exists() else find_checkpoint(folder)
