"""How much memory there is, to refuse what can never fit. Light."""

from __future__ import annotations

import os

from vistok.core.errors import ConfigError


def total_memory() -> int | None:
    """Return the bytes of this machine's main memory; None where that is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def in_units(size: float) -> str:
    """Return a number of bytes for people: `3.2 GB`."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def fits_in_memory(size: int, what: str) -> None:
    """Raise if so many bytes are more than the whole memory of this machine.

    Args:
        size: in bytes.
        what: begins the message: a key with its value, and what takes the memory.

    Raises:
        ConfigError: with both sizes.
    """
    total = total_memory()
    if total is not None and size > total:
        raise ConfigError(
            f"{what} takes {in_units(size)}; this machine has {in_units(total)} of memory"
        )
