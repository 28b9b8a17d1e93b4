"""The parts of `report.html` that show what a prior generates."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistok.core.terminal import counted
from vistok.evaluation.report.parts import e, facts

#: Sheets that an evaluation writes, and what they show.
_SHEETS = {
    "samples": ("Samples", "Generated, in the order of their numbers; not chosen."),
    "nearest": ("Nearest training images", "Above generated pictures, below the nearest of them."),
}


def is_generated(results: Mapping[str, Any]) -> bool:
    """Return whether these are results of a prior, and not of a tokenizer."""
    return "num_samples" in results


def generated_html(results: Mapping[str, Any]) -> str:
    """Return how much was generated, by which weights, and what it was compared with."""
    weights = "averaged weights" if results["weights"] == "ema" else "raw weights"
    against = results.get("compared_with")
    compared = f", compared with <code>{e(str(against))}</code>" if against else ""
    return f"Generated <b>{counted(results['num_samples'], 'image')}</b> by {weights}{compared}."


def generated_parts(results: Mapping[str, Any], measured: Path) -> list[str]:
    """Return the sheets of pictures that are there, and how the ids were drawn."""
    parts = []
    for name, (heading, note) in _SHEETS.items():
        path = measured / f"{name}.png"
        if path.is_file():
            content = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<section id="{name}"><h2>{heading}</h2><p class="note">{note}</p>'
                f'<div class="scroll"><img alt="{heading}" src="data:image/png;base64,{content}">'
                "</div></section>"
            )
    rows = [["checkpoint", results["checkpoint"]], *results["sampling"].items()]
    parts.append(f'<section id="sampling"><h2>Sampling</h2>{facts(rows)}</section>')
    return parts
