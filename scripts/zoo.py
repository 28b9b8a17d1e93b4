"""Train every tiny preset on the same shards for as many samples, and write one table.

    python scripts/zoo.py train='/sets/train-*.tar' val='/sets/val-*.tar' out=zoo
    python scripts/zoo.py ... rows=titok_tiny,vqgan_tiny samples=28160 image_size=64
    python scripts/zoo.py ... only=speed,table            # on idle cores: images/s, seconds
    python scripts/zoo.py ... only=table                  # the table again, of what is there

A row is an experiment `configs/experiment/*_tiny.yaml` of a tokenizer, or one of TWINS: such a
preset with a word or two more, next to it. Reference rows are JPEG and WebP without headers and
k-means over patches, at the bytes that the rows take.

Keys: `train` and `val` (shards), `out` (a folder), `rows` (their folders' names between commas;
all by default), `samples` (that each sees), `image_size`, `seeds` (between commas; for the rows of
SEEDED, all others take the first), `pictures` (columns of the sheet), `only` (phases between
commas: train, evaluate, references, speed, table; all but speed by default). Any other `key=value`
goes to every training.

It may be ended at any time and started again with the same words: a run that is done is not
repeated, one that was under way continues at its last checkpoint, and so does an evaluation. A row
that fails is named at the end, and the others are trained. `out` then holds `runs/ROW`, each with
its evaluation, `references/ROW`, `table.md`, `table.json` and `sheet.png`: originals, and below
them the reconstructions of each row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tokenizers"))
sys.path.insert(0, str(ROOT / "scripts"))

import zoo_measure as measure  # noqa: E402
import zoo_table as table  # noqa: E402

#: Presets whose decoder reads a text, and their words for the one that every image gets: a zero,
#: since photographs without captions must not tell the decoder anything that the codes leave out.
TEXTS = {"ta_titok_tiny": ["tokenizer.decoder.num_text_tokens=1", "tokenizer.decoder.text_dim=1"]}

#: How an adversary's weight is set; by default it follows the gradients at the picture.
ADAPTIVE = "loss.terms.adversarial.adaptive=true"
FIXED = ["loss.terms.adversarial.adaptive=false", "loss.terms.adversarial.weight=0.1"]

#: Rows next to a preset: its name and more words.
TWINS: dict[str, list[str]] = {
    "one_d_piece_tiny, full": ["tokenizer.length.distribution=full"],
    "titok_tiny, adversary": ["adversary=patch", *FIXED],
    "titok_tiny, adaptive adversary": ["adversary=patch", ADAPTIVE],
    "titok_tiny, lite0 adversary": ["adversary=lite0"],
    "titok_tiny, hed_vgg, lite0 adversary": ["loss=mse_hed_vgg", "adversary=lite0"],
    "llamagen_tiny, adversary": ["adversary=patch", *FIXED],
    "llamagen_tiny, adaptive adversary": ["adversary=patch", ADAPTIVE],
    "llamagen_tiny, hed_vgg": ["loss=mse_hed_vgg"],
    "llamagen_tiny, hed_vgg, adaptive adversary": ["loss=mse_hed_vgg", "adversary=patch", ADAPTIVE],
    "llamagen_tiny, hed_vgg, lite0 adversary": ["loss=mse_hed_vgg", "adversary=lite0"],
}

#: Rows that are trained with each of `seeds`.
SEEDED = ("titok_tiny", "one_d_piece_tiny")

DEFAULTS = {
    "train": "",
    "val": "",
    "out": "zoo",
    "rows": "",
    "samples": "7040",
    "image_size": "64",
    "seeds": "0,1,2",
    "pictures": "8",
    "only": "train,evaluate,references,table",
}

PHASES = ("train", "evaluate", "references", "speed", "table")

#: Samples of a step, and how much longer the learning rate's cosine is than the run (the tiny
#: presets end at 80 % of it).
BATCH, COSINE = 32, 1.25

#: Checkpoints and validations of a run.
CHECKPOINTS, VALIDATIONS = 8, 2


def main(words: Sequence[str]) -> int:
    """Train, evaluate and write the table; return 1 if a row failed."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    settings = {**DEFAULTS, **{k: v for k, v in given.items() if k in DEFAULTS}}
    extra = [f"{k}={v}" for k, v in given.items() if k not in DEFAULTS]
    phases = settings["only"].split(",")
    if unknown := sorted({*phases} - {*PHASES}):
        sys.exit(f"only={settings['only']}: no phase {unknown[0]}; there are: {', '.join(PHASES)}")
    out = Path(settings["out"]).resolve()
    jobs = planned(settings)
    failed: dict[str, str] = {}
    for number, (name, job) in enumerate(in_order(jobs), 1):
        run = out / "runs" / slug(name)
        sets = with_texts(out, settings) if name.split(",")[0] in TEXTS else settings
        asked = [*job, *data_words(sets), *run_words(settings), *extra]
        print(f"[{number}/{len(jobs)}] {name}", flush=True)
        problem = None
        if "train" in phases:
            problem = trained(run, asked, settings)
        if "evaluate" in phases and not problem:
            problem = evaluated(run)
        if "speed" in phases and not problem:
            problem = timed(run, asked)
        if problem:
            failed[name] = problem
    if "references" in phases:
        failed |= measured_references(out, settings, jobs)
    if "table" in phases:
        table.write(out, {name: slug(name) for name in jobs}, int(settings["pictures"]))
    print("\n".join([f"failed: {name}: {why}" for name, why in failed.items()] or ["done"]))
    return bool(failed)


# ---------------------------------------------------------------------- what is trained


def rows() -> dict[str, list[str]]:
    """Return the words of each row by its name: all tiny presets of tokenizers, and their twins."""
    found = {}
    for path in sorted((ROOT / "configs/experiment").glob("*_tiny.yaml")):
        if "- _prior" in path.read_text():
            continue
        found[path.stem] = [f"experiment={path.stem}", *TEXTS.get(path.stem, [])]
        for twin, words in TWINS.items():
            if twin.split(",")[0] == path.stem:
                found[twin] = [f"experiment={path.stem}", *words]
    return found


def planned(settings: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the words of each training, by its name in the table."""
    known = rows()
    if settings["rows"]:
        by_slug = {slug(name): name for name in known}
        wanted = settings["rows"].split(",")
        if missing := [name for name in wanted if name not in by_slug]:
            sys.exit(f"rows: no row {missing[0]}; there are: {', '.join(by_slug)}")
        known = {by_slug[name]: known[by_slug[name]] for name in wanted}
    jobs = {}
    seeds = [int(seed) for seed in settings["seeds"].split(",")]
    for name, words in known.items():
        for seed in seeds if name in SEEDED else seeds[:1]:
            label = f"{name}, seed {seed}" if name in SEEDED and len(seeds) > 1 else name
            jobs[label] = [*words, f"seed={seed}"]
    return jobs


def in_order(jobs: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Return presets, then twins, then further seeds: an early end leaves most systems done."""
    first = next(iter(jobs.values()))[-1]
    return sorted(jobs.items(), key=lambda item: (item[1][-1] != first, len(item[1])))


def slug(name: str) -> str:
    """Return the name of a row's folder."""
    return name.replace(", ", "-").replace(" ", "_").strip()


def data_words(settings: Mapping[str, str]) -> list[str]:
    """Return the words that name the data, for trainings."""
    return [
        "data=shards",
        f"data.train={settings['train']}",
        f"data.val={settings['val']}",
        f"data.image_size={settings['image_size']}",
        f"data.batch_size={BATCH}",
    ]


def with_texts(out: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings whose shards hold the same images, each with the text of TEXTS."""
    found = dict(settings)
    for split in ("train", "val"):
        found[split] = str(measure.texts_added(settings[split], out / "texts" / split) / "*.tar")
    return found


def steps_of(settings: Mapping[str, str]) -> int:
    """Return the optimizer steps of a run."""
    return -(-int(settings["samples"]) // BATCH)


def run_words(settings: Mapping[str, str]) -> list[str]:
    """Return the words that give every run the same length."""
    steps = steps_of(settings)
    return [
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={-(-steps // VALIDATIONS)}",
        f"callbacks.checkpoint_every={-(-steps // CHECKPOINTS)}",
        "callbacks.report=false",
        f"optimizer.total_samples={round(int(settings['samples']) * COSINE)}",
        "trainer.enable_progress_bar=false",
        "baseline=null",
    ]


# ---------------------------------------------------------------------- what is done for a row


def trained(run: Path, words: Sequence[str], settings: Mapping[str, str]) -> str | None:
    """Train a row unless it is done; return what went wrong, or None."""
    steps = steps_of(settings)
    if finished(run) > steps:
        return f"{run} has {finished(run)} steps, not {steps}; choose another out="
    if finished(run) == steps:
        return None
    words = [*words, f"hydra.run.dir={run}", "resume=auto"]
    return command([sys.executable, str(ROOT / "train.py"), *words], run)


def finished(run: Path) -> int:
    """Return the steps of a run that ended, 0 if it did not."""
    path = run / "summary.json"
    return int(json.loads(path.read_text())["steps"]) if path.is_file() else 0


def evaluated(run: Path) -> str | None:
    """Evaluate a run's last weights unless that is done; return what went wrong, or None.

    The last, not the best of its validations: these see the very images that are measured.
    """
    summary, results = run / "summary.json", run / "eval" / "metrics.json"
    if not summary.is_file():
        return f"{run} is not trained"
    if results.is_file() and results.stat().st_mtime > summary.stat().st_mtime:
        return None
    words = [f"run={run / 'checkpoints' / 'last.ckpt'}", f"out={run / 'eval'}"]
    return command([sys.executable, str(ROOT / "eval.py"), *words], run)


def timed(run: Path, words: Sequence[str]) -> str | None:
    """Measure a row's images/s, memory and seconds; return what went wrong, or None.

    The cores must be idle.
    """
    if not finished(run):
        return f"{run} is not trained"
    speed, doctor = run / "speed.json", run / "doctor.json"
    if speed.is_file():
        return None
    words = ["doctor", *words, "steps=24", f"out={doctor}"]
    environment = {"PYTHONPATH": str(ROOT / "tokenizers")}
    if problem := command([sys.executable, "-m", "vistok", *words], run, environment):
        return problem
    report = json.loads(doctor.read_text())
    found = {"seconds": 3600 * report["hours"], "memory_gib": report["memory_gib"]}
    table.write_text(speed, json.dumps(found | measure.images_per_second(run), indent=2) + "\n")
    return None


def measured_references(
    out: Path, settings: Mapping[str, str], jobs: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Measure codecs and k-means at the bytes of the rows; return what went wrong, by name."""
    runs = [out / "runs" / slug(name) for name in jobs]
    runs = [run for run in runs if (run / "eval" / "metrics.json").is_file()]
    failed = {}
    if not runs:
        return failed
    print("references", flush=True)
    for folder in measure.references(runs, out / "references"):
        results = folder.with_name(folder.name + "_eval")
        if (results / "metrics.json").is_file():
            continue
        words = [
            *(f"images={folder}", "data=shards", f"data.val={settings['val']}"),
            *(f"data.image_size={settings['image_size']}", "data.val_crop=adm_center"),
        ]
        problem = command([sys.executable, str(ROOT / "eval.py"), *words], folder)
        if problem:
            failed[folder.name] = problem
    return failed


def command(
    words: Sequence[str], run: Path, environment: Mapping[str, str] | None = None
) -> str | None:
    """Run a command, with its output at the end of the row's log; return what went wrong."""
    log = run.with_name(run.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "COLUMNS": "100", **(environment or {})}
    with log.open("a") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=variables)
    return f"see {log}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
