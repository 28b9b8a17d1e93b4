"""From photographs to generated pictures: tokenizers, tokens, priors, and which is best for what.

    uv run scripts/end_to_end.py out=runs/e2e train='/sets/train-*.tar' val=/sets/val-000000.tar

Trains tokenizers, exports them, tokenizes the images, trains a GPT and MaskGIT on the tokens of
each, and evaluates everything: PSNR and rFD-lite0 of the tokenizers, likelihood and gFD-lite0 of
the priors, in `table.md`. What is done is not done again, and a training that was interrupted goes
on, so the same command continues after any stop. `steps=` and `prior_steps=` set the cost,
`tokenizers=` and `priors=` what is trained.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Tokenizers by name: words of their training. All make 64 ids of an image of 32 px.
ONE_D = ["experiment=titok_tiny", "tokenizer.encoder.patch_size=4"]
TOKENIZERS = {
    "titok_1d": ONE_D,
    "vqgan_2d": ["experiment=vqgan_tiny", "tokenizer.encoder.stem=2"],
    "titok_1d_256_codes": [*ONE_D, "quantizer.codebook_size=256"],
}

#: The distance of reconstructions from their originals, as that of generated pictures.
FD = "fd_lite0={_target_:frechet,network:{_target_:lite0}}"

PRIORS = {"gpt": "ar_gpt_tiny", "maskgit": "maskgit_prior_tiny"}

DEFAULTS = {
    "out": "runs/end_to_end",
    "train": "",
    "val": "",
    "size": "32",
    "steps": "1000",
    "prior_steps": "2000",
    "samples": "2000",
    "tokenizers": ",".join(TOKENIZERS),
    "priors": ",".join(PRIORS),
}


def vistok(*words: str) -> None:
    """Run a command of vistok; end with its error if it fails."""
    print("vistok", *words, flush=True)
    code = subprocess.run(
        [sys.executable, "-m", "vistok", *words], cwd=ROOT / "tokenizers"
    ).returncode
    if code:
        sys.exit(code)


def timed(times: Path, name: str, *words: str) -> None:
    """Run a command and keep its seconds."""
    begun = time.time()
    vistok(*words)
    kept = json.loads(times.read_text()) if times.exists() else {}
    kept[name] = round(kept.get(name, 0) + time.time() - begun, 1)
    times.write_text(json.dumps(kept, indent=2) + "\n")


def length(steps: str) -> list[str]:
    """Return the words for so many steps; the last is validated, and so may be the best."""
    return [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]


def main(argv: list[str]) -> int:
    """Do what is not done yet, then write the table."""
    words = dict(DEFAULTS)
    for word in argv:
        key, equals, value = word.partition("=")
        if key not in words or not equals:
            print(f"{word}: expected one of {', '.join(f'{k}=' for k in words)}", file=sys.stderr)
            return 2
        words[key] = value
    if not words["train"] or not words["val"]:
        print("train= and val= name shards of images", file=sys.stderr)
        return 2
    out = Path(words["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    times = out / "seconds.json"
    places = [Path(words[key]).resolve() for key in ("train", "val")]
    images = ["data=shards", f"data.train={places[0]}", f"data.val={places[1]}"]
    sized = [f"data.image_size={words['size']}", "data.augment=[hflip]", "data.num_workers=0"]
    names = words["tokenizers"].split(",")
    for name in names:
        run, export, tokens = out / f"{name}_run", out / f"{name}_export", out / f"{name}_tokens"
        if not (run / "summary.json").exists():
            timed(
                times, name, "train", *TOKENIZERS[name], *images, *sized,
                "baseline.patch_size=null", "optimizer.total_samples=null",
                *length(words["steps"]), f"hydra.run.dir={run}", "resume=auto",
            )  # fmt: skip
        if not (run / "eval" / "metrics.json").exists():
            timed(times, f"{name} eval", "eval", f"run={run}", "eval=pixels", f"+eval.metrics.{FD}")
        if not (export / "model.safetensors").exists():
            vistok("export", f"run={run}", f"out={export}")
        for part, place in zip(("train", "val"), places, strict=True):
            if not (tokens / part / "manifest.json").exists():
                source = f"data.train={place}"
                timed(
                    times, f"{name} tokens", "tokenize", f"model={export}", "data=shards", source,
                    f"out={tokens / part}",
                )  # fmt: skip
    rows = []
    for kind in words["priors"].split(","):
        for name in names:
            run, export, tokens = (out / f"{name}_{part}" for part in ("run", "export", "tokens"))
            prior = out / f"{name}_{kind}"
            if not (prior / "summary.json").exists():
                timed(
                    times, f"{name} {kind}", "train", f"experiment={PRIORS[kind]}",
                    f"tokens={tokens / 'train'}", f"data.val={tokens / 'val'}",
                    f"data.tokenizer={export}", *length(words["prior_steps"]),
                    f"hydra.run.dir={prior}", "resume=auto",
                )  # fmt: skip
            if not (prior / "eval" / "metrics.json").exists():
                timed(
                    times, f"{name} {kind} eval", "eval", f"run={prior}",
                    f"prior.images={places[1]}", f"prior.num_samples={words['samples']}",
                )  # fmt: skip
            copies = json.loads((run / "eval" / "metrics.json").read_text())
            told = {"psnr": copies["psnr"], "rfd_lite0": copies["fd_lite0"]}
            found = json.loads((prior / "eval" / "metrics.json").read_text())
            rows.append({**found, "tokenizer": name, "prior": kind, **told})
            (out / "table.md").write_text(table(rows))
    print(table(rows))
    return 0


def table(rows: list[dict]) -> str:
    """Return a table of all tokenizers and priors."""
    columns = (
        "tokenizer", "psnr", "rfd_lite0", "prior", "nll_per_token", "bigram_nll", "unigram_nll",
        "gfd_lite0", "lite0_precision", "lite0_recall",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        told = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
