"""Numbers, tables and lists as HTML, and the data that a page's script reads."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.evaluation.report import charts

e = html.escape


def number(value: Any) -> str:
    """Return a number for people."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}".replace(",", "\u202f")


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return an HTML table; numbers are to the right."""
    top = "".join(f"<th class='{'n' if i > 1 else ''}'>{e(h)}</th>" for i, h in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class='n'>{number(v)}</td>" if v is None or charts.is_number(v)
            else f"<td>{e(str(v))}</td>"
            for v in row
        )
        + "</tr>"
        for row in rows
    )  # fmt: skip
    head = f"<thead><tr>{top}</tr></thead>"
    return f"<div class='scroll'><table>{head}<tbody>{body}</tbody></table></div>"


def facts(rows: Iterable[Sequence[Any]]) -> str:
    """Return keys and values as an HTML table."""
    body = "".join(
        f"<tr><th>{e(str(key))}</th><td><code>{e(_plain(value))}</code></td></tr>"
        for key, value in rows
    )
    return f"<div class='scroll'><table>{body}</table></div>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def leaves(value: Mapping[str, Any], key: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested values."""
    for name, inner in value.items():
        here = f"{key}.{name}" if key else name
        if isinstance(inner, Mapping) and inner:
            yield from leaves(inner, here)
        else:
            yield here, inner


def budgets_shown(results: Mapping[str, Any]) -> list[str]:
    """Return the numbers of tokens that pictures are shown at, rising; "0" for none."""
    found = {b for p in results.get("pictures", []) if p["spread"] for b in p["files"]}
    return sorted(found, key=int)


def per_image(path: Path, results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """Return the values of the images shown: by place, number of tokens and metric."""
    shown = {str(p["number"]) for p in results.get("pictures", [])}
    budgets = budgets_shown(results)
    if not path.is_file() or not budgets:
        return {}
    names = [n for n in results.get("higher_is_better", {}) if n in ("psnr", "ssim")] or list(
        results.get("higher_is_better", {})
    )
    found: dict[str, dict[str, dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            if row["number"] not in shown:
                continue
            own = found[row["number"]] = {b: {} for b in budgets}
            for budget in budgets:
                for name in names[:2]:
                    value = row.get(name if budget == budgets[-1] else f"{name}@{budget}")
                    if value:
                        own[budget][name] = number(float(value))
    return found


def script_data(results: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return the JSON that the slider and the captions read."""
    budgets = budgets_shown(results) or ["0"]
    rows = {str(row["num_tokens"]): row for row in results.get("budgets", [])}
    if "num_tokens" in results:
        own = {**results, "bytes": -(-results["bits_per_image"] // 8)}
        rows.setdefault(str(results["num_tokens"]), own)
    labels = {}
    for budget in budgets:
        row = rows.get(budget, {})
        parts = [f"{budget} tokens"] if budget != "0" else []
        if "bytes" in row:
            parts.append(f"{number(row['bytes'])} bytes")
        if charts.is_number(row.get("psnr")):
            parts.append(f"PSNR {number(row['psnr'])} dB")
        labels[budget] = " · ".join(parts)
    data = {"budgets": budgets, "labels": labels, "values": values}
    return json.dumps(data).replace("<", "\\u003c")
