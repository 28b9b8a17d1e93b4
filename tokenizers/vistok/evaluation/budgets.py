"""The curve of a flexible tokenizer: quality against tokens and bytes, next to JPEG and WebP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.evaluation.codecs import COUNTED, TITLES
from vistok.evaluation.plots import Panel, Series
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer


def checked_budgets(tokenizer: Tokenizer, budgets: Any) -> list[int]:
    """`eval.num_tokens`, rising and each once; none for null and for an empty list.

    Raises:
        ConfigError: if the tokenizer can't be measured at one of them.
    """
    wanted = [] if budgets is None else budgets if isinstance(budgets, list) else [budgets]
    most = tokenizer.num_tokens
    if not all(type(k) is int and 1 <= k <= most for k in wanted):
        raise ConfigError(f"eval.num_tokens={budgets}: must be integers from 1 to {most}")
    if not isinstance(tokenizer, FlexibleTokenizer) and set(wanted) - {most}:
        raise ConfigError(
            f"eval.num_tokens={budgets}: {type(tokenizer).__name__} has a fixed length of {most} "
            "tokens; other budgets need a flexible tokenizer (docs/guide/flexible_length.md)"
        )
    return sorted(set(wanted))


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return PSNR against tokens, and against bytes with the codecs."""
    rows = results["budgets"]
    psnr = [row["psnr"] for row in rows]
    by_bytes = [Series("tokenizer", [row["bytes"] for row in rows], psnr)]
    for name, points in results["codecs"].items():
        if points:
            x = [p["payload_bytes"] for p in points]
            label = f"{TITLES[name]} {COUNTED['payload']}"
            by_bytes.append(Series(label, x, [p["psnr"] for p in points]))
    return [
        Panel("tokens", "PSNR (dB)", [Series("tokenizer", [r["num_tokens"] for r in rows], psnr)]),
        Panel("bytes", "PSNR (dB)", by_bytes),
    ]


def print_budgets(results: Mapping[str, Any], out: Path) -> None:
    """Print a row for each budget, with the PSNR that the codecs reach in its bytes."""
    codecs = results["codecs"]
    table = Table(title=f"{out}/curve.png", title_justify="left")
    for name in ("tokens", "bytes", "psnr", "ssim", "codebook_usage", *codecs):
        table.add_column(name, justify="right")
    for row in results["budgets"]:
        cells = [f"{row['num_tokens']}", f"{row['bytes']}", f"{row['psnr']:.2f}"]
        cells += [f"{row['ssim']:.3f}", f"{row['codebook_usage']:.0%}"]
        for points in codecs.values():
            same = [p["psnr"] for p in points if p["max_bytes"] == row["bytes"]]
            cells.append(f"{same[0]:.2f}" if same else "too large")
        table.add_row(*cells)
    say(table)
