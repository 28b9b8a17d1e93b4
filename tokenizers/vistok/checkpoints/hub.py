"""Exports on the Hugging Face Hub. What comes from there is files, and no file runs code."""

from __future__ import annotations

import re
from pathlib import Path

from vistok.core.errors import CheckpointError

#: The files of an export; nothing else is fetched.
FILES = ("*.json", "*.safetensors", "README.md")

_NAME = re.compile(r"(hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


def on_hub(place: str | Path) -> str | None:
    """Return the owner/name that a place stands for; None if it is a place on this machine.

    `owner/name` is one if nothing here has that name, nor its first part.
    """
    match = _NAME.fullmatch(str(place))
    if match is None:
        return None
    path = Path(match[2])
    return match[2] if match[1] or not (path.exists() or path.parent.exists()) else None


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the folder of an export of the Hub, which is kept in the Hub's own cache.

    Offline, or with HF_HUB_OFFLINE=1, it is the one in the cache.

    Args:
        name: owner/name.
        revision: a branch, a tag or a commit; None for the main branch.

    Raises:
        CheckpointError: if it cannot be had, or is not an export.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder here; to look for it on the Hugging Face Hub: "
            "pip install huggingface_hub"
        ) from None
    where = f"{name}{f'@{revision}' if revision else ''}"
    told = f"{where}: no such folder here, and not to be had from the Hugging Face Hub"
    offline = False
    try:
        HfApi().model_info(name, revision=revision, timeout=5)
    except HfHubHTTPError as error:
        raise CheckpointError(f"{told}: {_reason(error)}") from None
    except Exception:  # whatever its client raises without a network, at once and not in a minute
        offline = True
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(FILES), local_files_only=offline
            )
        )
    except Exception as error:
        why = "no connection, and it is not in the cache" if offline else _reason(error)
        raise CheckpointError(f"{told}: {why}") from None
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(f"{where}: on the Hub, but not an export of vistok")
    return folder


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def find_export(place: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an export, here or fetched from the Hub.

    Raises:
        CheckpointError: if there is none; a run is told how to become one.
    """
    if name := on_hub(place):
        return fetch(name, revision)
    folder = Path(str(place)).expanduser()
    if (folder / "model.safetensors").is_file():
        return folder
    if (folder / "checkpoints").is_dir() or folder.suffix == ".ckpt":
        raise CheckpointError(
            f"{place}: a run, not an export; first: vistok export run={place} out=exported/<name>"
        )
    raise CheckpointError(f"{place}: not an export; expected model.safetensors in it")
