"""One function that brings what older versions wrote into the form of today.

A run's config, a checkpoint and an export name the format in which they were written; without a
number it is 1. Each step below leads from one form to the next, and is never changed afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

#: The form that is written today.
FORMAT = 2


def migrate_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's or an export's config in today's form; one that has it already as it is.

    Args:
        config: plain containers, with `format` (1 if it is missing).
    """
    number = config.get("format", 1)
    if number == FORMAT:
        return config
    config = copy.deepcopy(config)
    for step in _CONFIG_STEPS[number - 1 :]:
        step(config)
    config["format"] = FORMAT
    return config


def _no_tuner(config: Any) -> None:
    """Attention that chose its kernel by trial takes the one that needed no trial."""
    if isinstance(config, dict):
        if config.get("attention") == "auto":
            config["attention"] = "dense"
        config = config.values()
    elif not isinstance(config, list):
        return
    for value in config:
        _no_tuner(value)


#: Steps from form 1 to 2, in their order; each changes the config in place.
_FROM_1: list[Callable[[dict[str, Any]], None]] = [_no_tuner]


def _from_1(config: dict[str, Any]) -> None:
    for step in _FROM_1:
        step(config)


_CONFIG_STEPS: list[Callable[[dict[str, Any]], None]] = [_from_1]
