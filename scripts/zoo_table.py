"""The table and the sheet of zoo.py, from what its runs left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo_measure as measure
from PIL import Image, ImageDraw
from torch import Tensor

#: Columns of the table: title, key of the results, format.
COLUMNS = (
    ("parameters, M", "parameters", "{:.2f}"),
    ("tokens", "num_tokens", "{:.0f}"),
    ("bits", "bits_per_image", "{:.0f}"),
    ("PSNR", "psnr", "{:.2f}"),
    ("SSIM", "ssim", "{:.3f}"),
    ("`hed_vgg`", "hed_vgg", "{:.3f}"),
    ("`lite0`", "lite0", "{:.3f}"),
    ("FD-lite0", "fd_lite0", "{:.1f}"),
    ("corrected", "fd_lite0_corrected", "{:.1f}"),
    ("N", "fd_lite0_images", "{:.0f}"),
    ("usage", "codebook_usage", "{:.0%}"),
    ("images/s", "images_per_second", "{:.0f}"),
    ("training, s", "seconds", "{:.0f}"),
)

#: Names of the references' folders, before their bytes, in words.
REFERENCES = {
    "jpeg": "JPEG, {} bytes without headers",
    "webp": "WebP, {} bytes without headers",
    "kmeans": "k-means over patches, {} bytes",
}


def write(out: Path, folders: Mapping[str, str], pictures: int) -> None:
    """Write `table.json`, `table.md` and `sheet.png` of the rows that are there.

    Args:
        out: folder of the zoo.
        folders: name of the folder in `runs` by the name of the row.
        pictures: columns of the sheet.
    """
    runs = {name: out / "runs" / folder for name, folder in folders.items()}
    runs = {name: run for name, run in runs.items() if (run / "eval/metrics.json").is_file()}
    if not runs:
        return
    rows = [trained_row(name, run) for name, run in runs.items()]
    rows += [reference_row(*named) for named in references(out)]
    write_text(out / "table.json", json.dumps(rows, indent=2) + "\n")
    write_text(out / "table.md", "\n".join([*table(rows), "", *notes(rows)]) + "\n")
    draw(sheet(runs, out, pictures), out / "sheet.png")


def trained_row(name: str, run: Path) -> dict[str, Any]:
    """Return the results of a run; its speed only where that was measured by itself."""
    results = json.loads((run / "eval/metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    speed = run / "speed.json"
    results |= {"images_per_second": None}
    results |= json.loads(speed.read_text()) if speed.is_file() else {}
    return {
        "row": name,
        **results,
        "parameters": results["model"]["parameters"] / 1e6,
        **{key: summary[key] for key in ("samples_seen", "alarms", "skipped_steps", "returns")},
    }


def references(out: Path) -> list[tuple[str, Path]]:
    """Return name and folder of each reference that was measured, by bytes."""
    found = []
    for path in (out / "references").glob("*_eval/metrics.json"):
        kind, size, _ = path.parent.name.split("_")
        found.append(
            (int(size), list(REFERENCES).index(kind), REFERENCES[kind].format(size), path.parent)
        )
    return [(name, folder) for _, _, name, folder in sorted(found)]


def reference_row(name: str, results: Path) -> dict[str, Any]:
    """Return the results of a reference."""
    found = json.loads((results / "metrics.json").read_text())
    bits = 8 * int(results.name.split("_")[1])
    return {"row": name, **found, "images_per_second": None, "bits_per_image": bits}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    columns = [c for c in COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    titles = ["row", *(title for title, _, _ in columns)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [f.format(row[key]) if row.get(key) is not None else "" for _, key, f in columns]
        lines.append("| " + " | ".join([row["row"], *cells]) + " |")
    return lines


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the rows have in common, and which differ from it: a line each."""
    from vistok.evaluation.protocol import differences

    trained = [row for row in rows if "samples_seen" in row]
    hashes = [row["protocol_hash"] for row in trained]
    usual = trained[hashes.index(max(set(hashes), key=hashes.count))]
    lines = [f"Protocol `{usual['protocol_hash'][:12]}`, {usual['images']} images."]
    others: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["protocol_hash"] != usual["protocol_hash"]:
            fields = differences(usual["protocol"], row["protocol"])
            what = ", ".join(dict.fromkeys(field.split(".")[0] for field, _, _ in fields))
            others.setdefault((row["protocol_hash"][:12], what), []).append(row["row"])
    for (short, what), names in others.items():
        lines.append(f"Protocol `{short}`, which differs in {what}: {'; '.join(names)}.")
    samples = sorted({row["samples_seen"] for row in trained})
    lines.append(f"Samples seen: {', '.join(f'{n:.0f}' for n in samples)}.")
    lines += [f"Alarm of {row['row']}: {alarm}" for row in trained for alarm in row["alarms"]]
    for row in trained:
        if row["skipped_steps"] or row["returns"]:
            skipped, returns = row["skipped_steps"], row["returns"]
            lines.append(f"{row['row']}: {skipped} skipped steps, {returns} returns.")
    if threads := {row["threads"] for row in trained if "threads" in row}:
        lines.append(f"Speed with {' or '.join(map(str, sorted(threads)))} threads.")
    return [line for text in lines for line in (text, "")][:-1]


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from vistok.core.files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------- pictures


def sheet(runs: Mapping[str, Path], out: Path, columns: int) -> list[tuple[str, Tensor]]:
    """Return name and pictures `(B, C, H, W)` uint8 of originals, rows and references."""
    keys, images = measure.originals(next(iter(runs.values())))
    wanted = min(columns, len(keys))
    places = [int((i + 0.5) * len(keys) / wanted) for i in range(wanted)]
    keys, images = [keys[i] for i in places], images[places]
    lines = [("originals", images)]
    lines += [(name, measure.reconstructions(run, images)) for name, run in runs.items()]
    for name, results in references(out):
        folder = results.with_name(results.name.removesuffix("_eval"))
        lines.append((name.removesuffix(" without headers"), measure.load_pictures(folder, keys)))
    return lines


def draw(lines: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Write pictures with the rows' names, enlarged to 128 px or so."""
    count, _, height, width = lines[0][1].shape
    scale = max(1, 128 // width)
    left, gap = 200, 4
    size = (left + count * (width * scale + gap), len(lines) * (height * scale + gap))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for row, (name, images) in enumerate(lines):
        top = row * (height * scale + gap)
        pen.text((6, top + height * scale // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            picture = measure.as_image(image)
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + column * (width * scale + gap), top))
    canvas.save(path)
