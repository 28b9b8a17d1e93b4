"""The charts of a report, from results to panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.core.files import parse_json
from vistok.evaluation.codecs import COUNTED, TITLES
from vistok.evaluation.plots import Panel, Series

#: Names of metrics for people, with their units.
NAMES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "seams": "gradient across 8 px borders / elsewhere",
    "hed_vgg": "hed_vgg distance",
    "lite0": "lite0 distance",
    "fd_lite0": "FD-lite0",
    "fd_lite0_corrected": "FD-lite0, corrected",
    "kid_lite0": "KID-lite0",
    "pr_lite0_precision": "precision (lite0)",
    "pr_lite0_recall": "recall (lite0)",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (AlexNet)",
    "fid": "rFID",
    "fid_corrected": "rFID, corrected",
    "inception_score": "IS",
    "inception_score_original": "IS of the originals",
    "codebook_usage": "codebook usage",
    "perplexity": "perplexity",
}

_AT_MOST = 400  # points of a line in a chart

#: Not metrics of images, and so without a curve of quality.
_COUNTS = ("bits", "bytes", "num_tokens", "images", "dead_codes", "codebook_usage", "perplexity")


def title(metric: str) -> str:
    """Return a metric's name for people."""
    return NAMES.get(metric, metric.replace("_", " "))


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def quality_names(row: Mapping[str, Any]) -> list[str]:
    """Return the metrics of quality among the numbers of a row of results."""
    return [
        k
        for k, v in row.items()
        if is_number(v) and not k.startswith(_COUNTS) and not k.endswith("_images")
    ]


def token_panels(results: Mapping[str, Any]) -> dict[str, Panel]:
    """Return each metric against the number of tokens; none for a single number of them."""
    rows = results.get("budgets") or []
    if len(rows) < 2:
        return {}
    panels = {}
    for name in quality_names(rows[-1]):
        found = [row for row in rows if is_number(row.get(name))]
        line = Series("tokenizer", [r["num_tokens"] for r in found], [r[name] for r in found])
        panels[name] = Panel("tokens", title(name), [line])
    return panels


def rate_panels(results: Mapping[str, Any]) -> dict[str, Panel]:
    """Return each metric against bytes, with the codecs; solid without headers, dashed with."""
    rates = results.get("rates")
    if not rates:
        return {}
    panels = {}
    for name in quality_names(rates["tokenizer"][-1]):
        found = [row for row in rates["tokenizer"] if is_number(row.get(name))]
        series = [Series("tokenizer", [r["bytes"] for r in found], [r[name] for r in found], 0)]
        for color, codec in enumerate(TITLES, 1):
            for counted, words in COUNTED.items():
                points = rates["codecs"].get(counted, {}).get(codec) or []
                points = [p for p in points if is_number(p.get(name))]
                if points:
                    x = [p[f"{counted}_bytes"] for p in points]
                    y, dashed = [p[name] for p in points], counted == "file"
                    series.append(Series(f"{TITLES[codec]} {words}", x, y, color, dashed))
        panels[name] = Panel("bytes per image", title(name), series)
    return panels


def code_panels(codes: Mapping[str, Any]) -> dict[str, Panel]:
    """Return the charts of the use of codes, by their captions."""
    panels = {}
    if frequencies := codes.get("frequencies"):
        x, y = zip(*frequencies, strict=True)
        label = "how often it came"
        panels["Frequency of the codes, by rank"] = Panel(
            "rank of the code", label, [Series("codes", x, y)], "log", "log", False
        )
    entropies = codes.get("position_entropy") or []
    if len(entropies) > 1:
        places = list(range(1, len(entropies) + 1))
        panels["Entropy of each position"] = Panel(
            "position of the token", "bits", [Series("entropy", places, entropies)], "linear",
            markers=len(places) <= 64,
        )  # fmt: skip
    innovation = codes.get("innovation") or []
    if len(innovation) > 1:
        x, y = zip(*innovation, strict=True)
        panels["Distinct codes after so many images"] = Panel(
            "images", "distinct codes", [Series("codes", x, y)], "log", markers=False
        )
    return panels


# ---------------------------------------------------------------------- training


def training_rows(run: Path) -> list[dict[str, float]]:
    """Return the logged rows of a run: of `metrics.csv` (older runs) and `metrics.jsonl`."""
    import csv

    rows: list[dict[str, float]] = []
    if (run / "metrics.csv").is_file():
        with open(run / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                rows.append({k: float(v) for k, v in row.items() if k and _is_float(v)})
    if (run / "metrics.jsonl").is_file():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            try:
                row = parse_json(line)
            except ValueError:
                break  # a kill can cut the last line short
            rows.append({k: v for k, v in row.items() if is_number(v)})
    return [row for row in rows if "step" in row]


def _is_float(text: Any) -> bool:
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def training_panels(rows: Sequence[Mapping[str, float]]) -> dict[str, Panel]:
    """Return the charts of a training, by their captions."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    losses = [name for name in names if name.startswith("loss/")]
    losses.sort(key=lambda name: name != "loss/total")
    panels = {}
    if losses:
        lines = [_line(rows, name, name.removeprefix("loss/")) for name in losses[:5]]
        positive = all(value > 0 for line in lines for value in line.y)
        scale = "log" if positive else "linear"
        panels["Losses"] = Panel("step", "loss", lines, "linear", scale, False)
    for name in names:
        if name.startswith("val/"):
            line = _line(rows, name, "validation")
            label = title(name.removeprefix("val/"))
            caption = f"Validation: {label}"
            panels[caption] = Panel("step", label, [line], "linear", markers=len(line.x) < 60)
    if "lr" in names:
        panels["Learning rate"] = Panel("step", "lr", [_line(rows, "lr", "lr")], "linear",
                                        markers=False)  # fmt: skip
    return {caption: panel for caption, panel in panels.items() if panel.series[0].x}


def _line(rows: Iterable[Mapping[str, float]], name: str, label: str) -> Series:
    points = [(row["step"], row[name]) for row in rows if name in row]
    stride = max(1, math.ceil(len(points) / _AT_MOST))
    points = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
    x, y = zip(*points, strict=True) if points else ((), ())
    return Series(label, x, y)
