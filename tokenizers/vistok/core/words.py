"""The words of a command: overrides, folders of configs, flags. Light."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vistok.core.errors import ConfigError

#: Keys whose value is a place on this machine; `~` is the home folder there, as in a shell.
_PLACES = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "resume",
    "init_from",
    "run",
    "model",
    "images",
    "tokens",
    "text",
    "out",
    "weights",
    "stage.proxy",
    "stage.autoencoder",
    "stage.weights",
    "data.train",
    "data.val",
    "data.tokenizer",
    "data.cache_dir",
    "prior.tokens",
    "prior.tokenizer",
    "prior.images",
    "eval.inception",
    "eval.vgg",
    "eval.alex",
)


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether a word asks for help."""
    return any(word in ("-h", "--help", "help") for word in argv)


def split(argv: Sequence[str]) -> tuple[list[str], list[Path], list[str]]:
    """Return the overrides, the folders given by --config-dir, and Hydra's other flags.

    Raises:
        ConfigError: for a word that is none of them.
    """
    overrides, flags = [], []
    others, folders = take_folders(argv)
    words = iter(others)
    for word in words:
        if word.lower() in ("debug=true", "debug=false"):
            continue  # `cli` reads it; Hydra would take it for a file of configs/debug
        if word.startswith("-"):
            flags.append(word)
            if word in ("--cfg", "-c", "--package", "-p", "--info", "-i"):
                flags += [w for w in [next(words, None)] if w]
        elif "=" in word or word.startswith("~") or word.startswith("hydra."):
            overrides.append(quoted(word))
        else:
            raise ConfigError(f"{word}: expected key=value; --help shows examples")
    return overrides, folders, flags


def quoted(override: str) -> str:
    """Return the override, with its value in quotes if Hydra's grammar would trip over it.

    Paths with braces ('train-{000000..000127}.tar'), spaces or parentheses need no care then, nor
    do places whose name Hydra would read as a number (2020), nor those that are there and that it
    would read as a choice (a,b) or a list ([1]). In places `~` is written out.

    Raises:
        ConfigError: if `~` names a home folder that is not there.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    is_place = key.lstrip("+") in _PLACES and bool(value)
    if is_place and value.startswith("~"):
        value = os.path.expanduser(value)
        if value.startswith("~"):
            raise ConfigError(f"{override}: there is no such home folder; write the path out")
        override = f"{key}={value}"
    try:
        parsed = OverridesParser.create().parse_override(override)
        read = parsed.value()
        number = isinstance(read, (int, float)) and not isinstance(read, bool)
        if not is_place or read == value or not (number or os.path.lexists(value)):
            return override
    except HydraException:
        pass
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


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
        folders.append(Path(os.path.expanduser(folder)))
    return others, folders


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """Return what the last override of a key sets it to; None for null, nothing, or without one."""
    values = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"{key}=")]
    value = values[-1].strip("'\"") if values else None
    return None if value in (None, "null", "") else value


def launched_from_outside() -> bool:
    """Return whether torchrun or srun started this process as one of several."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _number("WORLD_SIZE") > 1
    return "SLURM_PROCID" in os.environ and _number("SLURM_NTASKS") > 1


def _number(name: str) -> int:
    text = os.environ.get(name, "1")
    return int(text) if text.isdigit() else 1
