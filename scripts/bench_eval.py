"""Time the suites on photographs: uv run scripts/bench_eval.py data.val=SHARDS [suite=default].

Makes an untrained tokenizer of the tiny preset at 128 px, exports it, and evaluates it as a user
does. Reports wall time and peak memory; run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(words: list[str]) -> None:
    """Run the suites that are named, or default and full."""
    suites = [w.partition("=")[2] for w in words if w.startswith("suite=")] or ["default", "full"]
    data = [w for w in words if w.startswith("data")]
    if not data:
        sys.exit("which images? for example data.val='/sets/train-{000000..000003}.tar'")
    if not any(w.startswith("data=") for w in data):
        data.insert(0, "data=shards")
    with tempfile.TemporaryDirectory() as folder:
        run, export = Path(folder, "run"), Path(folder, "export")
        train = ["data.image_size=128", "trainer.max_steps=1", f"hydra.run.dir={run}"]
        call("train.py", "init=random", "baseline.patch_size=null", *train)
        call("scripts/export.py", f"run={run}", f"out={export}")
        for suite in suites:
            begun = time.perf_counter()
            out = Path(folder, suite)
            call("eval.py", f"model={export}", f"eval={suite}", f"out={out}", *data)
            seconds = time.perf_counter() - begun
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            images = json.loads((out / "metrics.json").read_text())["images"]
            print(f"{suite}: {images} images in {seconds:.0f} s, peak {peak:.1f} GB", flush=True)


def call(*words: str) -> None:
    """Run a command of the checkout."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
