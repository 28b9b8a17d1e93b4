"""Plain text for terminals and pipes, wrapped between words. Light: standard library alone."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

_SCRIPTS = ("train", "eval", "export", "import-weights", "make-shards", "check-shards")
_SCRIPTS += ("bench-data",)


def typed(command: str) -> str:
    """Return what to type for a command: `uv run train.py` in a checkout, else `vistok train`."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.suffix != ".py" or program.stem.replace("_", "-") not in _SCRIPTS:
        return f"vistok {command}"
    if command not in _SCRIPTS:
        return f"uv run vistok {command}"
    folder = "" if command in ("train", "eval") else "scripts/"
    return f"uv run {folder}{command.replace('-', '_')}.py"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 shard`, `2 shards`, `2 batches`."""
    ending = "es" if noun.endswith(("s", "ch", "sh", "x")) else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"


def width() -> int:
    """Return the columns to fill: those of the terminal, from 40 to 100; 80 in a pipe."""
    return max(40, min(100, shutil.get_terminal_size((80, 24)).columns))


def wrapped(text: str, first: str = "", rest: str = "", most: int | None = None) -> str:
    """Wrap text to the terminal, between words only.

    Args:
        text: in which white space counts as one space.
        first: begins the first line.
        rest: begins the others.
        most: lines at most; what does not fit becomes an ellipsis. None for all.
    """
    return textwrap.fill(
        " ".join(text.split()),
        width(),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" ...",
    )


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out terms and their explanations in two columns, wrapped to the terminal.

    A term that is wider than half of the terminal has its explanation on the next line.
    """
    rows = list(rows)
    half = width() // 2
    across = max((len(term) for term, _ in rows if len(term) <= half), default=8) + 4
    lines = []
    for term, text in rows:
        if not text:
            lines.append(f"  {term}")
        elif len(term) + 4 <= across:
            lines.append(wrapped(text, f"  {term}".ljust(across), " " * across))
        else:
            lines += [f"  {term}", wrapped(text, " " * across, " " * across)]
    return "\n".join(lines)


def show(text: str) -> None:
    """Print text, and end quietly if its reader has seen enough, as `head` does."""
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
