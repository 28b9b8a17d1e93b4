"""The words of a command line: overrides, folders of configs, and flags of Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vistok.core.errors import ConfigError


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether a word asks for help."""
    return any(word in ("-h", "--help", "help") for word in argv)


def split(argv: Sequence[str]) -> tuple[list[str], list[Path], list[str]]:
    """Return the overrides, the folders given by --config-dir, and Hydra's other flags."""
    from vistok.core.configuration import quoted

    overrides, flags = [], []
    others, folders = take_folders(argv)
    words = iter(others)
    for word in words:
        if word.lower() in ("debug=true", "debug=false"):
            continue  # `_guarded` reads it; Hydra would take it for a file of configs/debug
        if word.startswith("-"):
            flags.append(word)
            if word in ("--cfg", "-c", "--package", "-p", "--info", "-i"):
                flags += [w for w in [next(words, None)] if w]
        elif "=" in word or word.startswith("~") or word.startswith("hydra."):
            overrides.append(quoted(word))
        else:
            raise ConfigError(f"{word}: expected key=value; --help shows examples")
    return overrides, folders, flags


def take_folders(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return the words without --config-dir, and the folders that it gives."""
    others, folders = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--config-dir", "-cd"):
            others.append(word)
            continue
        folder = value if equals else next(words, "")
        if not folder:
            raise ConfigError("--config-dir: which folder? for example --config-dir=my_configs")
        folders.append(Path(folder).expanduser())
    return others, folders


def value(overrides: Sequence[str], key: str) -> str | None:
    """Return the last value that overrides give a key; None without one."""
    values = [o.partition("=")[2] for o in overrides if o.startswith(f"{key}=")]
    value = values[-1].strip("'\"") if values else None
    return None if value in (None, "null", "") else value
