"""The curve of a flexible tokenizer: quality against tokens and bytes, next to JPEG and WebP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.evaluation.codecs import codec_curves
from vistok.evaluation.evaluator import Evaluator
from vistok.evaluation.pictures import grid, save_png
from vistok.evaluation.plots import Panel, Series, draw
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer


def evaluate_budgets(
    tokenizer: Tokenizer,
    data: Any,
    out: Path,
    budgets: Sequence[int],
    sampling: dict[str, Any],
    codec_images: int,
    num_pictures: int,
    picture_scale: int,
) -> dict[str, Any]:
    """Measure a tokenizer at each budget; write `curve.png` and `budgets.png`.

    Bytes of a budget are its ids packed into whole bytes, without a header or entropy coding.
    JPEG and WebP get the same bytes, and two to sixteen times the largest of them, for their
    compressed data alone: their headers would not fit.

    Args:
        tokenizer: a flexible one, in eval mode.
        data: a DataModule that is set up.
        out: folder to write to.
        budgets: numbers of tokens, as `checked_budgets` gives them.
        sampling: further arguments of `detokenize`.
        codec_images: validation images to measure the codecs on, at most; 0 for none.
        num_pictures: rows of `budgets.png`; 0 for no picture.
        picture_scale: its integer enlargement.

    Returns:
        `budgets`: metrics of each, with `bytes`; `codecs`: see `codec_curves`.
    """
    evaluators = [Evaluator(tokenizer, num_tokens=k, sampling=sampling) for k in budgets]
    for batch in data.val_dataloader():
        for evaluator in evaluators:
            evaluator.update(batch["image"], batch["valid"], tokenizer.conditions_of(batch))
    rows = [evaluator.compute() for evaluator in evaluators]
    for row in rows:
        row["bytes"] = math.ceil(row["bits_per_image"] / 8 - 1e-9)
    results: dict[str, Any] = {"budgets": rows, "codecs": {}}
    if codec_images and tokenizer.channels in (1, 3):
        images = data.val_images(codec_images).cpu()
        limits = [int(row["bytes"]) for row in rows]
        limits += [limits[-1] * factor for factor in (2, 4, 8, 16)]
        results["codecs"] = codec_curves(images, sorted(set(limits)))
        results["codec_images"] = len(images)
    draw(panels(results), out / "curve.png")
    if num_pictures:
        samples = data.val_samples(num_pictures)
        images, conditions = samples["image"], tokenizer.conditions_of(samples)
        painters = [Evaluator(tokenizer, {}, num_tokens=k, sampling=sampling) for k in budgets]
        columns = [images.cpu()]
        columns += [painter.update(images, None, conditions).cpu() for painter in painters]
        save_png(grid(torch.stack(columns, dim=1)), out / "budgets.png", picture_scale)
    return results


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
            "tokens; other budgets need a flexible tokenizer (docs/flexible_length.md)"
        )
    return sorted(set(wanted))


def panels(results: dict[str, Any]) -> list[Panel]:
    """Return PSNR against tokens, and against bytes with the codecs."""
    rows = results["budgets"]
    psnr = [row["psnr"] for row in rows]
    by_bytes = [Series("tokenizer", [row["bytes"] for row in rows], psnr)]
    for name, points in results["codecs"].items():
        if points:
            label = {"jpeg": "JPEG", "webp": "WebP"}[name]
            x = [p["payload_bytes"] for p in points]
            by_bytes.append(Series(f"{label} without headers", x, [p["psnr"] for p in points]))
    return [
        Panel("tokens", "PSNR (dB)", [Series("tokenizer", [r["num_tokens"] for r in rows], psnr)]),
        Panel("bytes", "PSNR (dB)", by_bytes),
    ]


def print_budgets(results: dict[str, Any], out: Path) -> None:
    """A row for each budget, with what the codecs reach in its bytes."""
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
