"""Folders for files, and files that are written as a whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vistok.core.errors import nearest


def cache_dir() -> Path:
    """Return the folder for files that can be made again: `$VISTOK_CACHE`, or a default one.

    A user without a home, as of `docker run --user`, has one among the temporary files.
    """
    try:
        return _cache_dir()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"vistok-cache-{os.getuid()}"


def _cache_dir() -> Path:
    if chosen := os.environ.get("VISTOK_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vistok"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "vistok"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vistok"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; what is nested too deeply is a ValueError, as any other damage is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, largest: int = 1 << 24) -> dict[str, Any]:
    """Return what a JSON file holds that nothing depends on, such as a summary.

    Args:
        path: of the file.
        largest: bytes to read at most.

    Returns:
        Its keys; none if it is missing, damaged, too large, or something else.
    """
    try:
        if path.stat().st_size > largest:
            return {}
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def what_is_there(path: Path) -> str:
    """Return words for an error about a path that is not what was looked for.

    They name what a folder contains, or, for a path that does not exist, the nearest name.
    """
    folder = path if path.is_dir() else path.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:  # there is none, or it may not be read
        return ""
    if folder != path and (close := nearest(path.name, names)):
        return close
    if not names:
        return f"; {folder} is empty"
    more = ", ..." if len(names) > 5 else ""
    return f"; {folder} contains: {', '.join(names[:5])}{more}"


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        temporary.unlink(missing_ok=True)
