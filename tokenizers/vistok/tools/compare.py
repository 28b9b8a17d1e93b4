"""Put measured runs side by side: `vistok compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.evaluation.compare import as_markdown, compared, measured, unlike
from vistok.tools.words import Option, Tool, flag


def _run(places: list[str], options: dict[str, Any]) -> None:
    if len(places) < 2:
        raise ConfigError("compare: needs two or more runs, for example runs/a runs/b")
    results = {place: measured(Path(place).expanduser()) for place in places}
    apart = unlike(results)
    if apart and not options["anyway"]:
        raise ConfigError(f"{apart[0]}; anyway=true compares all the same")
    lines = compared(results)
    table = Table()
    table.add_column("")
    for place in results:
        table.add_column(escape(place), justify="right")
    for line in lines:
        table.add_row(*map(escape, line))
    say(table)
    for line in apart:
        say(f"[yellow]{escape(line)}[/yellow]")
    if options["out"]:
        Path(options["out"]).write_text(as_markdown(list(results), lines, apart))


TOOL = Tool(
    name="compare",
    about="Put the numbers of runs side by side. Runs that were measured under unlike protocols "
    "are refused: their numbers do not compare.",
    place="RUN RUN ...",
    place_is="run, export or folder of an evaluation",
    place_about="Each RUN is a run folder, an export or the folder of an evaluation, measured by "
    "vistok eval.",
    options={
        "anyway": Option(
            "true: compare unlike protocols; a warning names the fields", flag, "false"
        ),
        "out": Option("a file for the table in Markdown", str, "", "table.md"),
    },
    run=_run,
    examples=["runs/a runs/b exported/c"],
)
