"""Push an export to the Hugging Face Hub; `vistok.load("owner/name")` pulls it."""

from __future__ import annotations

import re
from pathlib import Path

from vistok.checkpoints.exports import check_export
from vistok.checkpoints.hub import FILES
from vistok.core.errors import CheckpointError, ConfigError


def check_name(name: str) -> None:
    """Raise a ConfigError if `name` is not owner/name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(f"push={name}: must be owner/name, as on the Hugging Face Hub")


def push(folder: Path, name: str) -> str:
    """Upload an export, and return the address of its commit.

    The login is that of `hf auth login`, or HF_TOKEN.

    Args:
        folder: of the export.
        name: owner/name; made if it is not there.

    Raises:
        ConfigError: if `name` is not one, or huggingface_hub is not installed.
        CheckpointError: if the export is damaged, or cannot be uploaded.
    """
    check_name(name)
    check_export(folder)
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError(f"push={name}: pip install huggingface_hub") from None
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder,
            repo_id=name,
            allow_patterns=list(FILES),
            commit_message="Upload a tokenizer",
        )
    except Exception as error:  # of its HTTP library too, which is another one in each version
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(f"push={name}: could not be uploaded: {reason}") from None
    return str(done)
