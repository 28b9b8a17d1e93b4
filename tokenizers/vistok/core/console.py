"""What the terminal is told."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False)


def say(text: object) -> None:
    """Print text (rich markup) or a table; long lines are left to the terminal to wrap."""
    console.print(text, soft_wrap=True)
