"""Reference losses of the tiny presets, which show whether a change moved any number.

    python tests/reference_losses.py --check [PRESET ...] [--steps 10]
    python tests/reference_losses.py --write [PRESET ...]

Trains each preset on the embedded photographs for 30 steps of 8 images, in float32 on one thread,
and compares the losses with `assets/losses/<family>.json`, or writes them. A family is the vendor
of the processor and the instructions that torch uses. With a file of the same family and torch the
losses must be equal in all digits. Otherwise the first 10 of the presets without a CNN must agree
within 1e-3 with the file of some family. Those with a CNN cannot be compared then: rounding errors
move latents from one code to another, as early as in the data-dependent start (measured with the
instructions of AVX2 against those of AVX-512: gigatok_tiny 3e-2 at the first step and 0.2 at the
third, hita_tiny 3e-3 after 10; the presets without a CNN 3e-7).

Two processors of one family can still differ in a last digit, for some kernels depend on the sizes
of the caches. To be sure, on any processor, write the file anew before a change and check after it.

`ta_titok_tiny` is not among the presets: it needs shards with text features, and none are embedded;
nor are priors, which need tokens.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import contextlib
import io
import json
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
import torch

from helpers import CONFIGS, losses_of
from vistok.cli import train

FOLDER = Path(__file__).resolve().parent / "assets" / "losses"
STEPS = 30
CLOSE, CLOSE_STEPS = 1e-3, 10
NEEDS_OTHER_DATA = ("ta_titok_tiny", "ar_gpt_tiny", "maskgit_prior_tiny")
#: Presets whose losses are alike on all processors.
STEADY = ("flextok_tiny", "one_d_piece_tiny", "titok_tiny")

#: On top of a preset: what makes it cheap and exact. Its warm-up is longer than these runs, so
#: their learning rates do not depend on the number of steps.
WORDS = [
    "seed=0",
    "init_images=64",
    "data.batch_size=8",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "callbacks.num_pictures=0",
    "baseline=null",
]


def presets() -> list[str]:
    """Return the names of the experiments that train on embedded data in minutes."""
    names = sorted(path.stem for path in (CONFIGS / "experiment").glob("*_tiny.yaml"))
    return [name for name in names if name not in NEEDS_OTHER_DATA]


def family() -> str:
    """Return the vendor of the processor and the instructions that torch uses."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
                found = line.partition(":")[2].strip()
                return f"{vendor.get(found, found)}_{_instructions()}".lower()
    return f"{platform.machine()}_{_instructions()}".lower()


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability().replace(" ", "_")


def measure(preset: str, steps: int) -> list[float]:
    """Train a preset and return the loss of each step, with all digits that the run has written."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [f"experiment={preset}", *WORDS, f"trainer.max_steps={steps}"]
        with contextlib.redirect_stdout(said):
            code = train([*words, f"hydra.run.dir={run}"])
        if code:
            raise SystemExit(f"{preset}: the run ended with {code}\n{said.getvalue()}")
        return [float(loss) for loss in losses_of(run).values()]


def stored() -> dict[str, dict]:
    """Return the content of each family's file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def write(found: dict[str, list[float]]) -> Path:
    """Put losses into the file of this family; those of another torch in it are dropped."""
    path = FOLDER / f"{family()}.json"
    kept = stored().get(family(), {})
    losses = kept["losses"] if kept.get("torch") == torch.__version__ else {}
    losses = dict(sorted({**losses, **found}.items()))
    lines = [f'    "{name}": {json.dumps(values)}' for name, values in losses.items()]
    text = ",\n".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "torch": "{torch.__version__}",\n  "losses": {{\n{text}\n  }}\n}}\n')
    return path


def compare(preset: str, found: list[float], files: dict[str, dict]) -> tuple[str, str]:
    """Compare the losses of a preset with the files.

    Args:
        preset: its name.
        found: the losses measured here.
        files: content of each family's file.

    Returns:
        "equal", "FAILED" or "unknown", and a line that says more.
    """
    files = {name: content for name, content in files.items() if preset in content["losses"]}
    own = files.get(family())
    if own and own["torch"] == torch.__version__:
        wanted = own["losses"][preset][: len(found)]
        differ = [i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
        if not differ:
            return "equal", f"{len(found)} losses of {family()} in all digits"
        i = differ[0]
        return "FAILED", (
            f"step {i + 1} has {found[i]!r}, {family()} has {wanted[i]!r}; "
            f"at worst {_distance(found, wanted):.1g} apart"
        )
    near = {
        name: _distance(found[:CLOSE_STEPS], content["losses"][preset][: len(found)][:CLOSE_STEPS])
        for name, content in files.items()
    }
    if not near:
        return "unknown", "no file has it; --write makes one"
    name = min(near, key=near.__getitem__)
    line = f"within {near[name]:.1g} of {name} (torch {files[name]['torch']})"
    if preset not in STEADY:
        return "unknown", f"{line}, which says little; --write before the change, then --check"
    return "equal" if near[name] <= CLOSE else "FAILED", line


def _distance(found: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def main() -> int:
    """Check or write, as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the files")
    what.add_argument("--write", action="store_true", help="write the file of this family")
    parser.add_argument("--steps", type=int, default=STEPS, help="of --check, at most 30")
    parser.add_argument("preset", nargs="*", help="all, if none is named")
    given = parser.parse_args()
    unknown = set(given.preset) - set(presets())
    if unknown or not 1 <= given.steps <= STEPS or (given.write and given.steps != STEPS):
        parser.error(f"presets are {', '.join(presets())}; 1 to {STEPS} steps, all with --write")
    torch.set_num_threads(1)
    failed = False
    for preset in given.preset or presets():
        found = measure(preset, given.steps)
        if given.write:
            print(f"{preset}: written to {write({preset: found})}", flush=True)
            continue
        verdict, line = compare(preset, found, stored())
        print(f"{preset}: {verdict}, {line}", flush=True)
        failed |= verdict == "FAILED"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
