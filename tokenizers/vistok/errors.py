"""Errors meant for people: one line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VistokError(ValueError):
    """Something a user can cause and mend; the command line prints it without a traceback."""


class ConfigError(VistokError):
    """A key or value of the configuration is wrong; the message names the key."""


class DataError(VistokError):
    """A file, shard or image is missing or broken; the message names it."""


class CheckpointError(VistokError):
    """A checkpoint or export is missing, damaged or of another architecture."""


class Preempted(Exception):
    """The machine is wanted back: what was done is saved, and the same command goes on from there.

    The command line then exits with `EXIT_CODE`, which sysexits.h calls "try again later".
    """

    EXIT_CODE = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
