"""Rules for the values of arguments."""

from __future__ import annotations

import math
from typing import Any

from vistok.core.errors import ArgumentError, as_written


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float, which true and false are not here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is an integer: 8.0 is none."""
    return is_number(value) and isinstance(value, int)


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of `least` or more."""
    if not is_whole(value) or value < least:
        found = f"{name}={as_written(value)}"
        raise ArgumentError(f"{found}: must be a whole number, {least} or more")


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Refuse what is no finite number of `least` to `most`; NaN is none."""
    if not (is_number(value) and least <= value <= most and abs(value) != math.inf):
        bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ArgumentError(f"{name}={as_written(value)}: must be a number, {bounds}")
