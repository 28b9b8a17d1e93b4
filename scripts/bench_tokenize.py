"""Bulk tokenizing against the model's own best forward rate, in one run on one machine.

    python scripts/bench_tokenize.py model=exported/mine [images=4096] [threads=1] [rounds=5]

Both run in one process with the same threads: the forward on pixels that are in memory, at the best
of several batch sizes, and the whole way from JPEG files to a folder of tokens at that batch size.
They alternate, and the median of their ratios counts, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vistok.core.configuration import compose, to_container
from vistok.data.shards import ShardWriter
from vistok.export.plan import Settings
from vistok.export.tokenize import prepare
from vistok.tools.words import Option, Tool, whole


def photographs(folder: Path, count: int, side: int) -> None:
    """Write JPEG images of photographs' size and smoothness as two shards."""
    import simplejpeg

    rng = np.random.default_rng(0)
    with ShardWriter(folder, "bench", 10**9) as writer:
        for number in range(count):
            coarse = torch.from_numpy(rng.random((1, 3, 12, 16), dtype=np.float32))
            smooth = torch.nn.functional.interpolate(coarse, (side, side * 4 // 3), mode="bicubic")
            pixels = smooth[0].permute(1, 2, 0).numpy() * 255 + rng.normal(
                0, 6, (side, side * 4 // 3, 1)
            )
            image = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
            writer.write(simplejpeg.encode_jpeg(image, quality=90), "jpg", number % 10)
            if number == count // 2:
                writer.roll()


def main(place: str | None, values: dict) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"model={values['model']}", f"out={folder}/tokens", "workers=1"]
        words += [f"threads={values['threads']}", f"decode_threads={values['threads']}"]
        config = to_container(compose("tokenize", [*words, "batch_size=1"]))
        photographs(Path(folder), 8, 64)
        data = [f"data.train={folder}/bench-*.tar"]
        tokenizer = prepare(Settings.of(config), data).tokenizer
        best, batch = 0.0, 1
        for size in (1, 4, 16, 32, 64):
            images = torch.randint(0, 256, (size, tokenizer.channels, *tokenizer.image_size))
            images = images.to(torch.uint8)
            tokenizer.tokenize(images)
            rates = []
            for _ in range(3):
                begun = time.perf_counter()
                tokenizer.tokenize(images)
                rates.append(size / (time.perf_counter() - begun))
            print(f"forward, batch {size}: {max(rates):.1f} images/s")
            best, batch = max((best, batch), (max(rates), size))
        for path in Path(folder).glob("bench-*"):
            path.unlink()
        photographs(Path(folder), values["images"], int(min(tokenizer.image_size) * 1.25))
        config |= {"batch_size": batch}
        images = torch.randint(0, 256, (batch, tokenizer.channels, *tokenizer.image_size))
        images = images.to(torch.uint8)
        steps = max(1, values["images"] // batch)

        def forward() -> float:
            begun = time.perf_counter()
            for _ in range(steps):
                tokenizer.tokenize(images)
            return steps * batch / (time.perf_counter() - begun)

        ratios = []
        for number in range(values["rounds"]):
            worker = prepare(Settings.of(config | {"out": f"{folder}/bulk{number}"}), data)
            before, begun = forward(), time.perf_counter()
            worker.run(0, 1)
            rate = values["images"] / (time.perf_counter() - begun)
            waited = worker.progress.waited / worker.progress.seconds
            ratios.append(2 * rate / (before + forward()))
            print(
                f"bulk, batch {batch}: {rate:.1f} images/s, {100 * waited:.0f} % waiting for data, "
                f"{ratios[-1]:.3f} of the forwards before and after"
            )
    print(f"ratio to the best forward rate, median: {statistics.median(ratios):.3f}")


TOOL = Tool(
    name="bench_tokenize",
    about="Measure bulk tokenizing against the model's own forward rate.",
    place="[key=value]",
    place_is="word",
    place_about="",
    run=main,
    options={
        "model": Option("an export", str, None, "exported/mine"),
        "images": Option("JPEG images to tokenize", whole(16), "4096"),
        "threads": Option("of torch, and as many that decode", whole(1), "1"),
        "rounds": Option("of forward, bulk and forward again", whole(1), "5"),
    },
)

if __name__ == "__main__":
    sys.exit(TOOL(sys.argv[1:]))
