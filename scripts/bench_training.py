"""Speed and memory of training steps and of encoding, beside a plain matrix product.

    python scripts/bench_training.py                                     # titok_s128, batch 2
    python scripts/bench_training.py experiments=titok_tiny,vqgan_tiny batch=32 out=bench.json
    python scripts/bench_training.py precisions=32,bf16 device=cuda batch=64 compile=true

Keys: `experiments` (of configs/experiment), `batch`, `precisions` (32, bf16 as autocast, 16 on a
GPU), `device`, `threads` (0: as torch has it), `seconds` (of measuring each case), `compile` and
`out` (a JSON file). Any other `key=value` goes to the experiment's config.

A training step is forward, loss, backward, clipping, AdamW and the quantizer's `after_step` on
images that are there already; encode is `tokenize` in eval mode. Floating-point operations are
counted by torch, once, of the products in forward and backward alone. The matrix product is
2048 x 2048 x 2048 in the same precision. The three take turns, so that a busy machine disturbs
all alike, and the best time of each counts. Every case has a process of its own; memory is that
process's peak (on a GPU, of the allocator), with the weights, moments and libraries in it.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tokenizers"))

DEFAULTS = {
    "experiments": "titok_s128",
    "batch": "2",
    "precisions": "32,bf16",
    "device": "cpu",
    "threads": "0",
    "seconds": "20",
    "compile": "false",
    "out": "",
}
SIDE = 2048  # of the matrix product
COLUMNS = (
    ("experiment", "{}"),
    ("precision", "{}"),
    ("step_s", "{:.3f}"),
    ("images_per_s", "{:.2f}"),
    ("encode_images_per_s", "{:.2f}"),
    ("gflop_per_image", "{:.1f}"),
    ("gflops", "{:.0f}"),
    ("product_gflops", "{:.0f}"),
    ("share", "{:.2f}"),
    ("peak_mib", "{:.0f}"),
)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One experiment in one precision; runs in a process of its own."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from vistok.checkpoint import build, build_tokenizer
    from vistok.configuration import compose, to_container
    from vistok.training.optimizers import build_optimizer

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    device = torch.device(case["device"])
    torch.manual_seed(0)
    words = [f"experiment={case['experiment']}", *case["overrides"]]
    config = to_container(compose("train", words))
    tokenizer = build_tokenizer(config).to(device).train()
    loss = build(config["loss"])
    settings = config["optimizer"]
    optimizer = build_optimizer(
        tokenizer, settings["lr"], settings["betas"], settings["weight_decay"]
    )
    images = torch.rand(case["batch"], tokenizer.channels, *tokenizer.image_size, device=device)
    kinds = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
    kind = kinds[case["precision"]]
    autocast = torch.autocast(device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)
    forward = torch.compile(tokenizer.forward) if case["compile"] else tokenizer.forward
    a, b = torch.randn(2, SIDE, SIDE, device=device, dtype=kind or torch.float32).unbind(0)

    def backward() -> None:
        with autocast:
            output = forward(images * 2 - 1)
            total = loss(output, tokenizer.quantizer.loss_weights, 0)["total"]
        total.backward()

    def step() -> None:
        tokenizer.train()
        optimizer.zero_grad()
        backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        tokenizer.quantizer.after_step([optimizer])

    def encode() -> None:
        tokenizer.eval()
        with autocast:
            tokenizer.tokenize(images)

    step()  # starts the codebook, the moments and the compiler
    eager, forward = forward, tokenizer.forward
    # The fused attention kernels are not counted; the plain products of the same attention are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        optimizer.zero_grad()
        backward()
    forward = eager
    work = {"step": step, "encode": encode, "product": lambda: a @ b}
    best = turns(work, case["seconds"], device.type == "cuda")
    flops = counter.get_total_flops()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    gflops, product = flops / best["step"] / 1e9, 2 * SIDE**3 / best["product"] / 1e9
    return {
        "experiment": case["experiment"],
        "precision": case["precision"],
        "batch": case["batch"],
        "step_s": best["step"],
        "images_per_s": case["batch"] / best["step"],
        "encode_images_per_s": case["batch"] / best["encode"],
        "gflop_per_image": flops / case["batch"] / 1e9,
        "gflops": gflops,
        "product_gflops": product,
        "share": gflops / product,
        "peak_mib": peak,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
    }


def turns(
    work: dict[str, Callable[[], None]], seconds: float, synchronize: bool
) -> dict[str, float]:
    """Best time of each piece of work in seconds, one call each per round, at least three."""
    import torch

    best = dict.fromkeys(work, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name, call in work.items():
            begin = time.perf_counter()
            call()
            if synchronize:
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - begin)
        rounds += 1
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [[name for name, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[form.format(row[name]) for name, form in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> int:
    """Measure, print a table, write the JSON."""
    values, overrides = dict(DEFAULTS), []
    for word in argv:
        key, _, value = word.partition("=")
        if key in values:
            values[key] = value
        elif "=" in word:
            overrides.append(word)
        else:
            print(f"error: {word}: expected key=value; see the top of this file", file=sys.stderr)
            return 2
    rows = []
    for experiment in values["experiments"].split(","):
        for precision in values["precisions"].split(","):
            case = {
                "experiment": experiment,
                "precision": precision,
                "batch": int(values["batch"]),
                "device": values["device"],
                "threads": int(values["threads"]),
                "seconds": float(values["seconds"]),
                "compile": values["compile"] == "true",
                "overrides": overrides,
            }
            with mp.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (case,)))
    print(table(rows))
    if values["out"]:
        Path(values["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
