"""Measure how long a checkpoint holds up training: written in the background, and at once.

    uv run scripts/bench_checkpoint.py [folder=FOLDER] [megabytes=400] [saves=5] [out=FILE.json] ...

First a made-up state, that of a model with Adam moments and averaged weights, of any size. Between
saves the process computes as training does, and the time of those steps is measured too, with and
without a write under way: what happens in the background takes its share of the processor.

Then training itself: the default run, changed by further words (experiment=vqgan_tiny), which saves
after every fourth step. A step lasts from the beginning of its batch to that of the next, with the
save behind it; `stall_ms` is the median of steps with a save less that of steps without one, and
`after_ms` the median of the steps right behind a save, when a write may be under way.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))

import torch

from vistok.cli import train
from vistok.tasks.reconstruction import Reconstruction
from vistok.training.checkpointing import CheckpointWriter

EVERY = 4  # steps of training between saves


def state_of(megabytes: int) -> dict:
    """A checkpoint's content: weights, two moments and an average, in tensors of 4 MB."""
    tensors = [torch.randn(1 << 20) for _ in range(max(4, megabytes // 4))]
    quarter = len(tensors) // 4
    parts = [tensors[i * quarter : (i + 1) * quarter] for i in range(4)]
    names = ("state_dict", "exp_avg", "exp_avg_sq", "ema")
    return {
        **{name: dict(enumerate(part)) for name, part in zip(names, parts, strict=True)},
        "global_step": 0,
    }


def step(x: torch.Tensor) -> float:
    """Seconds of something like a training step."""
    started = time.perf_counter()
    for _ in range(4):
        x @ x
    return time.perf_counter() - started


def measure(content: dict, folder: Path, background: bool, saves: int) -> dict[str, float]:
    """Medians over the saves."""
    writer = CheckpointWriter(keep_last=2, background=background)
    x = torch.randn(512, 512)
    quiet = statistics.median(step(x) for _ in range(20))
    stalls, steps, writes = [], [], []
    for number in range(saves):
        content["global_step"] = number
        started = time.perf_counter()
        writer.save_checkpoint(content, folder / "checkpoints" / "last.ckpt")
        stalls.append(writer.stall)
        while writer.busy:
            steps.append(step(x))
        writer.join()
        writes.append(time.perf_counter() - started)
    return {
        "stall_s": statistics.median(stalls),
        "largest_stall_s": max(stalls),
        "write_s": statistics.median(writes),
        "step_ms": 1e3 * quiet,
        "step_ms_during_a_write": 1e3 * statistics.median(steps or [quiet]),
    }


def train_and_measure(words: list[str], folder: Path, background: bool, saves: int) -> dict:
    """Medians over the steps of a run, in milliseconds."""
    times: list[float] = []
    real = Reconstruction.on_train_batch_start

    def note(self: Reconstruction, *arguments: object) -> None:
        times.append(time.perf_counter())
        real(self, *arguments)

    Reconstruction.on_train_batch_start = note
    try:
        code = train(
            [
                *words,
                f"trainer.max_steps={EVERY * (saves + 2) + 1}",
                "trainer.val_check_interval=1000",
                "trainer.limit_val_batches=1",
                "trainer.enable_progress_bar=false",
                f"callbacks.checkpoint_every={EVERY}",
                f"callbacks.background_checkpoints={str(background).lower()}",
                "baseline.patch_size=null",
                f"hydra.run.dir={folder}",
            ]
        )
    finally:
        Reconstruction.on_train_batch_start = real
    assert code == 0, "the run failed"
    steps = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    steps = steps[EVERY:]  # the first ones start the workers; a save ends each group of four
    with_save = statistics.median(steps[EVERY - 1 :: EVERY])
    after = statistics.median(steps[EVERY::EVERY])
    without = statistics.median([t for i, t in enumerate(steps) if i % EVERY in (1, 2)])
    size = sum(file.stat().st_size for file in (folder / "checkpoints").glob("last.ckpt"))
    return {
        "step_ms": without,
        "step_with_save_ms": with_save,
        "stall_ms": with_save - without,
        "after_ms": after,
        "megabytes": size / 1e6,
    }


def main(words: list[str]) -> None:
    """Print a table and write JSON."""
    known = ("folder", "megabytes", "saves", "out")
    options = dict(word.partition("=")[::2] for word in words if word.split("=")[0] in known)
    more = [word for word in words if word.split("=")[0] not in known]
    saves, megabytes = int(options.get("saves", 5)), int(options.get("megabytes", 400))
    content = state_of(megabytes)
    results: dict = {"megabytes": megabytes, "saves": saves, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder:
        for name, background in (("at_once", False), ("background", True)):
            results[name] = measure(content, Path(folder), background, saves)
        del content
        for name, background in (("at_once", False), ("background", True)):
            found = train_and_measure(more, Path(folder) / name, background, saves)
            results[f"training_{name}"] = found
    results["stall_ratio"] = results["at_once"]["stall_s"] / results["background"]["stall_s"]
    for name in ("at_once", "background"):
        numbers = "  ".join(f"{key} {value:.3f}" for key, value in results[name].items())
        print(f"{name:<11} {numbers}")
    print(f"a save in the background stalls training {results['stall_ratio']:.1f} times less")
    for name in ("training_at_once", "training_background"):
        print(f"{name:<19} " + "  ".join(f"{k} {v:.1f}" for k, v in results[name].items()))
    if out := options.get("out"):
        Path(out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
