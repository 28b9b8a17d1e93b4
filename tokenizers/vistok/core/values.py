"""Rules for the values of arguments."""

from __future__ import annotations

import math
from typing import Any

from vistok.core.errors import ArgumentError, as_written


def is_number(value: Any) -> bool:
    """Return whether a value is an integer or a float; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer; 8.0 is not."""
    return is_number(value) and isinstance(value, int)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise if a value is not an integer of `least` or more."""
    if not is_whole(value) or value < least:
        found = f"{name}={as_written(value)}"
        raise ArgumentError(f"{found}: must be a whole number, {least} or more")


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise if a value is not a finite number from `least` to `most`."""
    if not (is_number(value) and least <= value <= most and abs(value) != math.inf):
        bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ArgumentError(f"{name}={as_written(value)}: must be a number, {bounds}")
