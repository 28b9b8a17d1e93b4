"""Train the tiny presets on the same shards for as many samples, and write one table.

    python scripts/zoo.py train='/sets/train-*.tar' val='/sets/val-*.tar' out=zoo
    python scripts/zoo.py ... rows=titok_tiny,vqgan_tiny samples=28160 image_size=64
    python scripts/zoo.py out=zoo table=only                  # the table again, of what is there

Keys: `train` and `val` (shards), `out` (a folder), `rows` (names of ROWS between commas; all by
default), `samples` (that each sees), `image_size`, `seeds` (between commas; for the rows of SEEDED,
all others take the first), `pictures` (columns of the sheet), `table` (`only` trains nothing). Any
other `key=value` goes to every training.

It may be ended at any time and started again with the same words: a run that is done is not
repeated, one that was under way continues at its last checkpoint. A row that fails is named at the
end, and the others are trained. `out` then holds `runs/ROW`, each with its evaluation, `table.md`,
`table.json` and `sheet.png`: originals, and below them the reconstructions of each row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tokenizers"))

#: What is trained, by the name of its row.
ROWS: dict[str, list[str]] = {
    "titok_tiny": ["experiment=titok_tiny"],
    "gigatok_tiny": ["experiment=gigatok_tiny"],
    "hita_tiny": ["experiment=hita_tiny"],
    "vqgan_tiny": ["experiment=vqgan_tiny"],
    "one_d_piece_tiny": ["experiment=one_d_piece_tiny"],
    "one_d_piece_tiny, full": [
        "experiment=one_d_piece_tiny",
        "tokenizer.length.distribution=full",
    ],
    "retok_tiny": ["experiment=retok_tiny"],
    "restok_tiny": ["experiment=restok_tiny"],
    "flextok_tiny": ["experiment=flextok_tiny"],
    "titok_tiny, fsq": ["experiment=titok_tiny", "quantizer=fsq", "tokenizer.encoder.content=1"],
    "titok_tiny, lfq": ["experiment=titok_tiny", "quantizer=lfq"],
    "vqgan_tiny, var": ["experiment=vqgan_tiny", "quantizer=var"],
}

#: Rows that are trained with each of `seeds`.
SEEDED = ("titok_tiny", "one_d_piece_tiny")

DEFAULTS = {
    "train": "",
    "val": "",
    "out": "zoo",
    "rows": "",
    "samples": "28160",
    "image_size": "64",
    "seeds": "0,1,2",
    "pictures": "8",
    "table": "",
}

#: Samples of a step, and how much longer the learning rate's cosine is than the run (the tiny
#: presets end at 80 % of it).
BATCH, COSINE = 32, 1.25

#: Columns of the table: title, key of the results, format.
COLUMNS = (
    ("parameters, M", "parameters", "{:.2f}"),
    ("tokens", "num_tokens", "{:.0f}"),
    ("bits", "bits_per_image", "{:.0f}"),
    ("PSNR", "psnr", "{:.2f}"),
    ("SSIM", "ssim", "{:.3f}"),
    ("usage", "codebook_usage", "{:.0%}"),
    ("images/s, encode and decode", "images_per_second", "{:.0f}"),
    ("training, s", "seconds", "{:.0f}"),
)


def main(words: Sequence[str]) -> int:
    """Train, evaluate and write the table; return 1 if a row failed."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    settings = {**DEFAULTS, **{k: v for k, v in given.items() if k in DEFAULTS}}
    extra = [f"{k}={v}" for k, v in given.items() if k not in DEFAULTS]
    out = Path(settings["out"]).resolve()
    jobs = planned(settings)
    failed = []
    for number, (name, job) in enumerate(jobs.items(), 1):
        run = out / "runs" / slug(name)
        if settings["table"] != "only":
            print(f"[{number}/{len(jobs)}] {name}", flush=True)
            if not (trained(run, [*job, *extra], settings) and evaluated(run)):
                failed.append(f"{name}: see {run}.log")
    write_table(out, jobs, settings)
    print("\n".join([f"failed: {line}" for line in failed] or [f"table: {out / 'table.md'}"]))
    return bool(failed)


def planned(settings: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the words of each training, by its name in the table."""
    chosen = [name.strip() for name in settings["rows"].split(",")] if settings["rows"] else None
    if chosen:  # names may contain a comma themselves
        chosen = [name for name in ROWS if slug(name) in {slug(c) for c in chosen}]
        if not chosen:
            known = ", ".join(map(slug, ROWS))
            sys.exit(f"rows={settings['rows']}: no such row; there are: {known}")
    jobs = {}
    seeds = [int(seed) for seed in settings["seeds"].split(",")]
    for name in chosen or ROWS:
        for seed in seeds if name in SEEDED else seeds[:1]:
            label = f"{name}, seed {seed}" if name in SEEDED and len(seeds) > 1 else name
            jobs[label] = [*ROWS[name], f"seed={seed}"]
    return jobs


def slug(name: str) -> str:
    """Return the name of a row's folder."""
    return name.replace(", ", "-").replace(" ", "_").strip()


def trained(run: Path, job: Sequence[str], settings: Mapping[str, str]) -> bool:
    """Train a row unless it is done; return whether it is."""
    samples, size = int(settings["samples"]), settings["image_size"]
    steps = -(-samples // BATCH)
    if finished(run) >= steps:
        return True
    words = [
        *job,
        "data=shards",
        f"data.train={settings['train']}",
        f"data.val={settings['val']}",
        f"data.image_size={size}",
        f"data.batch_size={BATCH}",
        f"trainer.max_steps={steps}",
        f"optimizer.total_samples={round(samples * COSINE)}",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={run}",
        "resume=auto",
    ]
    return command([sys.executable, str(ROOT / "train.py"), *words], run) and (
        finished(run) >= steps
    )


def finished(run: Path) -> int:
    """Return the steps of a run that ended, 0 if it did not."""
    path = run / "summary.json"
    return int(json.loads(path.read_text())["steps"]) if path.is_file() else 0


def evaluated(run: Path) -> bool:
    """Evaluate a run unless that is done; return whether it is."""
    summary, results = run / "summary.json", run / "eval" / "metrics.json"
    if results.is_file() and results.stat().st_mtime > summary.stat().st_mtime:
        return True
    return command([sys.executable, str(ROOT / "eval.py"), f"run={run}"], run)


def command(words: Sequence[str], run: Path) -> bool:
    """Run a command, with its output at the end of the row's log; return whether it succeeded."""
    log = run.with_name(run.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(
            words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "100"}
        )
    return done.returncode == 0


def write_table(out: Path, jobs: Mapping[str, Sequence[str]], settings: Mapping[str, str]) -> None:
    """Write `table.json`, `table.md` and `sheet.png` of the rows that are there."""
    rows: list[dict[str, Any]] = []
    sheet: list[tuple[str, Any]] = []
    for name in jobs:
        run = out / "runs" / slug(name)
        if not (run / "eval" / "metrics.json").is_file():
            continue
        results = json.loads((run / "eval" / "metrics.json").read_text())
        summary = json.loads((run / "summary.json").read_text())
        rows.append(
            {
                "row": name,
                **{key: value for key, value in results.items() if not isinstance(value, list)},
                "seconds": summary["seconds"],
                "samples_seen": summary["samples_seen"],
                "parameters": parameters(run) / 1e6,
            }
        )
        sheet.append((name, reconstructions(name, run, int(settings["pictures"]))))
    out.mkdir(parents=True, exist_ok=True)
    write(out / "table.json", json.dumps(rows, indent=2) + "\n")
    titles = ["row", *(title for title, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for _, key, form in COLUMNS]
        lines.append("| " + " | ".join([row["row"], *cells]) + " |")
    write(out / "table.md", "\n".join(lines) + "\n")
    if sheet:
        draw(sheet, out / "sheet.png")


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from vistok.core.files import replacing

    with replacing(path) as file:
        file.write(text.encode())


def parameters(run: Path) -> int:
    """Return the number of parameters of a run's tokenizer, frozen ones too."""
    from vistok.checkpoints.load import load

    return sum(p.numel() for p in load(run).parameters())


def reconstructions(name: str, run: Path, columns: int) -> tuple[Any, Any]:
    """Return the first originals of a run's data and their reconstructions, `(B, C, H, W)`."""
    from vistok.checkpoints.find import find_checkpoint
    from vistok.checkpoints.load import load
    from vistok.data.datamodule import VistokDataModule
    from vistok.evaluation.inputs import data_config
    from vistok.metrics.image import to_uint8

    tokenizer = load(run)
    conditions = list(tokenizer.decoder.conditions)
    data = VistokDataModule(**data_config(find_checkpoint(run), [], 64, conditions))
    data.prepare_data()
    data.setup("validate")
    batch = data.val_samples(columns)
    images = batch["image"]
    with torch.no_grad():
        ids = tokenizer.tokenize(images)
        return images, to_uint8(tokenizer.detokenize(ids, **tokenizer.conditions_of(batch)))


def draw(sheet: Sequence[tuple[str, Any]], path: Path, scale: int = 2) -> None:
    """Write originals and reconstructions with the rows' names."""
    originals = sheet[0][1][0]
    count, _, height, width = originals.shape
    left, gap = 190, 4
    lines = [("originals", originals), *((name, pair[1]) for name, pair in sheet)]
    step = height * scale + gap
    canvas = Image.new("RGB", (left + count * (width * scale + gap), len(lines) * step), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (name, images) in enumerate(lines):
        pen.text((6, row * step + step // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            array = image.permute(1, 2, 0).cpu().numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + column * (width * scale + gap), row * step))
    canvas.save(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
