"""Folders for files, and files that are written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """Return the folder for files that can be made again: `$VISTOK_CACHE`, or a default one."""
    if chosen := os.environ.get("VISTOK_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vistok"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "vistok"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vistok"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends well, and vanishes otherwise.

    The data is on the disk before the name is, so a reader (or a restart after a kill) finds the
    old file, the new one or none, never a part of one.
    """
    # Processes of several machines, whose numbers may be the same, write to one folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
