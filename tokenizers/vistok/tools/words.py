"""The command line of the tools: a place and `key=value` options, read and checked in one way."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistok.core.errors import ConfigError, nearest
from vistok.core.terminal import columns, show, typed, wrapped

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Option:
    """An option of a tool.

    Args:
        about: what it does, for `--help`.
        read: makes the value from its text; raises a ValueError that says what is allowed.
        default: the text that is read if the option is not given; None if it must be given.
        example: a value for `--help` where there is no default.
    """

    about: str
    read: Callable[[str], Any] = str
    default: str | None = ""
    example: str = ""


@dataclass(frozen=True)
class Tool:
    """A command of its own words.

    Args:
        name: as it is typed, for example "make-shards".
        about: the first line of `--help`.
        place: the positional argument in `--help`; in brackets if it may be left out, with dots
            at its end if there may be several, which `run` then gets as a list.
        place_is: the same in words, for example "source of images".
        place_about: a paragraph on it for `--help`.
        kinds: kinds of places and what they are, for `--help`.
        options: by name.
        run: takes the place (None without one) and the value of every option; returns an exit
            code, or None for 0.
        closing: a paragraph at the end of `--help`.
        examples: words to type after the command.
    """

    name: str
    about: str
    place: str
    place_is: str
    place_about: str
    options: Mapping[str, Option]
    run: Callable[[Any, dict[str, Any]], int | None]
    kinds: Mapping[str, str] = field(default_factory=dict)
    closing: str = ""
    examples: Sequence[str] = ()

    def __call__(self, words: Sequence[str]) -> int:
        """Run with the words of a command line, and return the exit code."""
        asked = bool({"-h", "--help", "help"} & set(words))
        if asked or not (words or self._place_is_optional):
            show(self.help())
            return 0 if asked else 2
        return self.run(*self.read(words)) or 0

    def read(self, words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """Return the place (or a list of them) and the values of all options.

        Raises:
            ConfigError: naming the word that is wrong.
        """
        texts, places = {}, []
        for word in words:
            name, equals, text = word.partition("=")
            if not equals or "/" in name:  # a path may contain an equals sign
                places.append(word)
            elif name in self.options:
                texts[name] = text
            elif name != "debug":  # which the command line itself reads
                known = [*self.options, "debug"]
                raise ConfigError(f"{name}=: no such option{nearest(name, known)}; see --help")
        several = self.place.rstrip("]").endswith("...")
        if (len(places) > 1 and not several) or not (places or self._place_is_optional):
            found = " ".join(places) or "none"
            raise ConfigError(f"expected one {self.place_is}, found {found}; see --help")
        values = {name: _value(name, option, texts) for name, option in self.options.items()}
        if several:
            return places, values
        return (places[0] if places else None), values

    def help(self) -> str:
        """Return the text of `--help`."""
        program = typed(self.name)
        rows = [(f"{name}={o.default or o.example}", o.about) for name, o in self.options.items()]
        rows.append(("debug=false", "show the traceback of an error"))
        place = wrapped(self.place_about) + "\n" + columns(self.kinds.items())
        parts = (
            wrapped(self.about),
            f"  {program} {self.place} [key=value ...]",
            place.rstrip(),
            f"Options\n{columns(rows)}",
            wrapped(self.closing),
            "\n".join(["Examples", *(f"  {program} {words}".rstrip() for words in self.examples)]),
        )
        return "\n\n".join(filter(None, parts[: None if self.examples else -1]))

    @property
    def _place_is_optional(self) -> bool:
        return self.place.startswith("[")


def _value(name: str, option: Option, texts: Mapping[str, str]) -> Any:
    text = texts.get(name, option.default)
    if not text and option.default is None:
        raise ConfigError(f"{name}= is not set; for example {name}={option.example}")
    try:
        return option.read(text or "")
    except ValueError as error:
        raise ConfigError(f"{name}={text}: must be {error}") from None


def flag(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("true or false")
    return text.lower() in ("true", "1", "yes")


def whole(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"a whole number, {least} or more")
        return int(text)

    return read


def processes(text: str) -> int:
    """Read a number of processes; an empty text stands for one per core."""
    if text:
        return whole(1)(text)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def seconds(text: str) -> float:
    """Read a positive number of seconds."""
    return _number(text, "a number of seconds above 0", lambda value: 0 < value < float("inf"))


def fraction(text: str) -> float:
    """Read a number of at least 0 and below 1."""
    return _number(text, "at least 0 and below 1", lambda value: 0 <= value < 1)


def _number(text: str, wanted: str, allowed: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not allowed(value):
        raise ValueError(wanted)
    return value


def value_range(text: str) -> tuple[float, float] | None:
    """Read two numbers between commas, the first one smaller; None for an empty text."""
    if not text:
        return None
    low, _, high = text.strip("[]() ").partition(",")
    try:
        pair = float(low), float(high)
    except ValueError:
        pair = 0.0, 0.0
    if not -float("inf") < pair[0] < pair[1] < float("inf"):
        raise ValueError("two numbers, the values that are black and white, for example 0,1")
    return pair


VALUE_RANGE = Option(
    "LOW,HIGH: values that are black and white in images of more than 8 bits, as in training "
    "(data.value_range); empty: those of their types, which floats do not have",
    value_range,
)


def size(text: str) -> int:
    """Read a number of bytes, such as 300MB, 1.5GiB or 4096."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError("a size, for example 300MB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def names(text: str) -> tuple[str, ...] | None:
    """Read names between commas, without dots in front; None for an empty text."""
    found = [name.strip(" .").lower() for name in text.split(",")]
    return tuple(dict.fromkeys(filter(None, found))) or None
