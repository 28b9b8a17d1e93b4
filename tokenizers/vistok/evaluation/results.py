"""The folder that a measurement fills: `metrics.json`, a table of all images, pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vistok.core.errors import CheckpointError
from vistok.core.files import parse_json, replacing
from vistok.evaluation.pairs import Pairs

Rows = list[dict[str, Any]]


def write_json(path: Path, values: Any) -> None:
    """Write plain values, whole or not at all; NaN and infinities become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(finite(values), indent=2, allow_nan=False) + "\n").encode())


def finite(values: Any) -> Any:
    """Return plain values with None in the place of numbers that JSON does not have."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return values


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        return parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: could not be read ({error})") from error


# ---------------------------------------------------------------------- the table of images


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `per_image.csv`: a line for each image, in the order of the set."""
    rows = sorted(rows, key=lambda row: row["number"])
    text = io.StringIO()
    names = list(rows[0]) if rows else ["number", "key"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def extremes(rows: Rows, higher_is_better: Mapping[str, bool], count: int) -> dict[str, dict]:
    """Return the worst and the best images of each metric, as places in the set.

    Args:
        rows: of `per_image.csv`; the column of a metric has its name.
        higher_is_better: the metrics to look at.
        count: of each.

    Returns:
        metric to `worst` and `best`: lists of {number, key, value}, the outermost first. With few
        images the two do not overlap.
    """
    found = {}
    for name, higher in higher_is_better.items():
        valued = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        sign = 1 if higher else -1
        ordered = sorted(valued, key=lambda row: (sign * row[name], row["number"]))
        taken = min(count, len(ordered) // 2)
        if taken:
            found[name] = {
                "worst": [_place(row, name) for row in ordered[:taken]],
                "best": [_place(row, name) for row in ordered[: -taken - 1 : -1]],
            }
    return found


def _place(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"number": row["number"], "key": row["key"], "value": row[name]}


# ---------------------------------------------------------------------- pictures


def save_pictures(
    folder: Path, pairs: Sequence[Pairs], spread: Sequence[int], shown: int
) -> list[dict[str, Any]]:
    """Write originals and reconstructions as lossless WebP files.

    Args:
        folder: created; what an earlier measurement left there goes.
        pairs: each has its images.
        spread: places of the images to show at every number of tokens; others are written at
            `shown` alone.
        shown: the number of tokens of the headline.

    Returns:
        For each image `number`, `key`, `original` (a file in the folder), `files` (by number of
        tokens) and `spread`, whether it is one of those.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    listed = []
    for pair in pairs:
        for i, number in enumerate(pair.numbers):
            everywhere = number in spread
            files = {}
            for budget, pictures in pair.reconstructions.items():
                if everywhere or budget == shown:
                    files[str(budget)] = _save(pictures[i], folder / f"{number:06d}_{budget}.webp")
            original = _save(pair.originals[i], folder / f"{number:06d}.webp")
            entry = {"number": number, "key": pair.keys[i], "original": original, "files": files}
            listed.append({**entry, "spread": everywhere})
    return sorted(listed, key=lambda entry: entry["number"])


def _save(image: Tensor, path: Path) -> str:
    array = image.cpu().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)).save(
        path, format="WEBP", lossless=True, exact=True, method=2
    )
    return path.name
