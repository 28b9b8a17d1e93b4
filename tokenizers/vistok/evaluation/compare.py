"""Compare what was measured of several tokenizers, under one protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.core.errors import CheckpointError
from vistok.core.terminal import counted, typed
from vistok.evaluation.inputs import beside
from vistok.evaluation.protocol import differences, protocol_hash
from vistok.evaluation.report.charts import is_number
from vistok.evaluation.results import read_json

Results = Mapping[str, Mapping[str, Any]]

#: Numbers of `metrics.json` that are facts of the tokenizer or the machine, not of quality.
_LAST = ("bits_per_image", "bits_per_pixel", "num_tokens", "images_per_second")
_ASIDE = ("format", "images", "codec_images", "skipped_images")


def measured(folder: Path) -> dict[str, Any]:
    """Return the `metrics.json` of a run, an export or the folder of an evaluation.

    Raises:
        CheckpointError: if it was not evaluated, or its protocol is not the one of its hash.
    """
    for place in (folder, folder / "eval", beside(folder)):
        if (path := place / "metrics.json").is_file():
            results = read_json(path)
            break
    else:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        what = f"was not evaluated yet; {typed('eval')} run={folder} measures it"
        raise CheckpointError(f"{folder}: {what}")
    if not isinstance(results, dict) or "protocol" not in results:
        raise CheckpointError(
            f"{path}: holds no protocol (an evaluation of an older version); evaluate it again"
        )
    if protocol_hash(results["protocol"]) != results.get("protocol_hash"):
        raise CheckpointError(f"{path}: damaged; protocol_hash is not that of the protocol in it")
    return results


def unlike(results: Results) -> list[str]:
    """Return a line for each run whose protocol is not that of the first one, with the fields."""
    (first, reference), *others = results.items()
    lines = []
    for name, found in others:
        if found["protocol_hash"] == reference["protocol_hash"]:
            continue
        fields = [
            f"{key} ({_short(a)} / {_short(b)})"
            for key, a, b in differences(reference["protocol"], found["protocol"])
        ]
        lines.append(
            f"{first} and {name} were measured under unlike protocols: {', '.join(fields)}"
        )
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def compared(results: Results) -> list[list[str]]:
    """Return the lines of a table: a name, then a cell for each run."""
    runs = list(results.values())
    names = [k for run in runs for k, v in run.items() if is_number(v) and k not in _ASIDE]
    names = sorted(dict.fromkeys(names), key=lambda name: name in _LAST)
    lines = [
        ["images", *(str(run["images"]) for run in runs)],
        ["of", *(str(run["data"]) for run in runs)],
        ["protocol", *(run["protocol_hash"][:12] for run in runs)],
        ["tokenizer", *(_of_model(run, "tokenizer") for run in runs)],
        ["quantizer", *(_of_model(run, "quantizer") for run in runs)],
        ["parameters", *(_of_model(run, "parameters") for run in runs)],
    ]
    better = {name: up for run in runs for name, up in run.get("higher_is_better", {}).items()}
    for name in names:
        values: list[Any] = [run.get(name) for run in runs]
        cells = [f"{v:.4g}" if is_number(v) else "-" for v in values]
        known = [v for v in values if is_number(v)]
        if name in better and len(known) > 1:
            best = max(known) if better[name] else min(known)
            cells = [f"{c} *" if v == best else c for c, v in zip(cells, values, strict=True)]
        lines.append([name, *cells])
    return lines


def _of_model(run: Mapping[str, Any], key: str) -> str:
    value = (run.get("model") or {}).get(key)
    return "-" if value is None else f"{value / 1e6:.2f} M" if key == "parameters" else str(value)


def as_markdown(names: Sequence[str], lines: Sequence[Sequence[str]], apart: Sequence[str]) -> str:
    """Return the table as Markdown, with a warning for each run of another protocol."""
    cells = [["", *names], ["---", *["---:"] * len(names)], *lines]
    rows = ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in cells]
    warning = "".join(f"\n**{counted(1, 'warning')}**: {line}\n" for line in apart)
    return "\n".join(rows) + "\n" + warning
