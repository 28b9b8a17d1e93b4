"""Time the suites on photographs: uv run scripts/bench_eval.py data.val=SHARDS [images=1000].

Makes an untrained tokenizer of the tiny preset at 128 px, exports it, and evaluates it as a user
does, by each of `suites` (default,full). With fewer images than `images` in the shards they come
again under other names. Prints wall time and peak memory of each evaluation, and `out=FILE` writes
them as JSON; run it on a machine that does nothing else.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tokenizers"))

DEFAULTS = {"data.val": "", "images": "1000", "suites": "default,full", "size": "128", "out": ""}


def main(words: list[str]) -> None:
    """Run the suites one after the other."""
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    settings = {**DEFAULTS, **given}
    if unknown := sorted(given.keys() - DEFAULTS.keys()):
        sys.exit(f"{unknown[0]}: no such key; there are: {', '.join(DEFAULTS)}")
    if not settings["data.val"]:
        sys.exit("data.val: which images? for example data.val='/sets/train-{000000..000003}.tar'")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run, export, shard = Path(folder, "run"), Path(folder, "export"), Path(folder, "val.tar")
        repeated(settings["data.val"], int(settings["images"]), shard)
        size = f"data.image_size={settings['size']}"
        train = ["init=random", "baseline=null", "trainer.max_steps=1", f"hydra.run.dir={run}"]
        call("train.py", size, *train)
        call("scripts/export.py", f"run={run}", f"out={export}")
        for suite in settings["suites"].split(","):
            out = Path(folder, suite)
            data = ["data=shards", f"data.val={shard}"]
            seconds, peak = call("eval.py", f"model={export}", f"eval={suite}", f"out={out}", *data)
            images = json.loads((out / "metrics.json").read_text())["images"]
            row = {"suite": suite, "images": images, "seconds": seconds, "peak_gib": peak}
            rows.append(row)
            print(f"{suite}: {images} images in {seconds:.0f} s, peak {peak:.2f} GiB", flush=True)
    if settings["out"]:
        Path(settings["out"]).write_text(json.dumps(rows, indent=2) + "\n")


def repeated(shards: str, count: int, path: Path) -> None:
    """Write a shard of so many samples of shards, which come again if there are fewer."""
    from vistok.data.places import expand_shards

    files, written, last = expand_shards(shards, "data.val"), 0, None
    with tarfile.open(path, "w") as target:
        while True:
            for file in files:
                with tarfile.open(str(file)) as source:
                    for member in source:
                        if not member.isfile():
                            continue
                        key, _, extension = member.name.partition(".")
                        if key != last:
                            last, written = key, written + 1
                        if written > count:
                            return
                        data = source.extractfile(member).read()  # type: ignore[union-attr]
                        member.name = f"{written:06d}.{extension}"
                        target.addfile(member, io.BytesIO(data))
            last = None


def call(*words: str) -> tuple[float, float]:
    """Run a command of the checkout; return its seconds and peak memory in GiB."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, output.fileno(), n) for n in (1, 2)]
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        _, status, used = os.wait4(child, 0)
        if status:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace")[-2000:])
    unit = 1024 if sys.platform != "darwin" else 1
    return time.perf_counter() - begun, used.ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main(sys.argv[1:])
