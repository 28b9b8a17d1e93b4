"""Errors meant for people: one line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class VistokError(ValueError):
    """An error that a user can cause and fix; the command line prints it without a traceback."""


class ConfigError(VistokError):
    """A key or value of the configuration is wrong; the message names the key."""


class ArgumentError(ConfigError):
    """An argument of a part is wrong; the message begins with its name.

    A part does not know whether it is in an encoder or a decoder: `registry.build` puts its key
    in front.
    """


class DataError(VistokError):
    """A file, shard or image is missing or broken; the message names it."""


class CheckpointError(VistokError):
    """A checkpoint or export is missing, damaged or of another architecture."""


class Preempted(Exception):
    """The machine is needed elsewhere: the work is saved, and the same command continues it.

    The command line then exits with `EXIT_CODE`, which sysexits.h calls "try again later".
    """

    EXIT_CODE = 75


def as_written(value: Any) -> str:
    """Return a value as a config spells it: null, true, 2.5, word."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
