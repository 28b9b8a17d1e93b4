"""Output to the terminal."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False)


def say(text: object) -> None:
    """Print text (rich markup) or a table; the terminal wraps long lines."""
    console.print(text, soft_wrap=True)
