"""Write the page of a run, an export or an evaluation again: `vistok report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistok.core.console import say
from vistok.evaluation.report.page import find_measured, write_report
from vistok.tools.words import Tool


def _run(place: str | None, options: dict[str, Any]) -> None:
    folder = Path(place or ".").expanduser()
    measured, page = find_measured(folder)
    say(f"report: {write_report(measured, page)}")


TOOL = Tool(
    name="report",
    about="Write report.html of a run again, from what was measured; nothing is measured.",
    place="RUN",
    place_is="run, export or folder of an evaluation",
    place_about="RUN is a run folder, an export that was evaluated, or the folder of an "
    "evaluation. The page is one file, which needs no network.",
    options={},
    run=_run,
    examples=["runs/<run>"],
)
