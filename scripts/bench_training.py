"""Measure speed and memory of training steps and encoding, next to matrix products and a textbook.

    python scripts/bench_training.py                                     # titok_s128, batch 2
    python scripts/bench_training.py experiments=titok_tiny,vqgan_tiny batch=32 out=bench.json
    python scripts/bench_training.py precisions=32,32+compile,bf16,bf16+compile
    python scripts/bench_training.py precisions=32 parts=true            # where a step's time goes
    python scripts/bench_training.py experiments=llamagen_vq16 loss=mse adversary=none batch=1 \
        official=LlamaGen                                                # next to the authors' code

Keys: `experiments` (of configs/experiment), `batch`, `precisions` (32, bf16 as autocast, 16 on a
GPU; 32+high and 32+medium as `trainer.matmul_precision`; each with `+compile`, as `compile=true`
trains), `device`, `threads` (0: as torch has it), `seconds` (of measuring each experiment),
`textbook` (false: without), `official` (a checkout of https://github.com/FoundationVision/LlamaGen),
`clock` (wall; processor: time of the process alone, on a machine that others use, with
`threads=1`), `parts` (true: also the time of each operator, by torch's profiler, and of each
product by itself) and `out` (a JSON file). Any other `key=value` goes to the experiment's config.

A training step is forward, loss, backward, clipping, AdamW and the quantizer's `after_step` on
images that are there already; encode is `tokenize` in eval mode. Operations are counted by torch,
once, of the products in forward and backward alone. Beside it stand

- `product`: 2048 x 2048 x 2048 in the same precision;
- `own products`: the matrix products of this very step, with its shapes and layouts, one after the
  other and nothing between them, into memory that is there already;
- `textbook`: a step of TiTok written down plainly, in float32, from `nn.MultiheadAttention`,
  `nn.Conv2d` and `AdamW` without options, of the same sizes; for tokenizers of TiTok's parts;
- `official`: step and encode of LlamaGen's own VQ-16 or VQ-8, in float32, with the squared error,
  its quantizer's losses, clipping at 1 and its `Adam`.

Everything has a process of its own, and all take turns, so that a busy machine disturbs all alike;
medians over the rounds count. Memory is the process's peak (on a GPU, of the allocator), with the
weights, moments and libraries in it.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tokenizers"), str(ROOT / "scripts")]

DEFAULTS = {
    "experiments": "titok_s128",
    "batch": "2",
    "precisions": "32,bf16",
    "device": "cpu",
    "threads": "0",
    "seconds": "40",
    "textbook": "true",
    "official": "",
    "clock": "wall",
    "parts": "false",
    "out": "",
}
SIDE = 2048  # of the matrix product
REPEATS = 5  # of a product in one turn
SHOWN = 16  # operators, products: the longest
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
    ("own_products_gflops", "{:.0f}"),
    ("share_of_own", "{:.2f}"),
    ("times_textbook", "{:.2f}"),
    ("times_official", "{:.2f}"),
    ("encode_times_official", "{:.2f}"),
    ("peak_mib", "{:.0f}"),
)

Calls = dict[str, Callable[[], Any]]


def serve(case: dict[str, Any], pipe: Connection) -> None:
    """A contender in a separate process: says what it is, then runs and times what is asked."""
    import torch

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    build = {"textbook": textbook, "official": official}.get(case["precision"], ours)
    calls, facts = build(case)
    clock = {"wall": time.perf_counter, "processor": time.process_time}[case["clock"]]
    pipe.send((list(calls), facts))
    while (name := pipe.recv()) is not None:
        begin = clock()
        parts = calls[name]()
        if case["device"] == "cuda":
            torch.cuda.synchronize()
        pipe.send((clock() - begin, parts))


def ours(case: dict[str, Any]) -> tuple[Calls, dict[str, Any]]:
    """What is timed of an experiment in one precision, and its numbers."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from vistok.losses.objective import build_objective
    from vistok.models.build import build_tokenizer
    from vistok.models.term import Step
    from vistok.training.memory import keep_freed_memory
    from vistok.training.optimizers import build_optimizer

    if case["device"] == "cpu":
        keep_freed_memory()  # as training does
    device, config = torch.device(case["device"]), config_of(case)
    precision, *words = case["precision"].split("+")
    products = [word for word in words if word != "compile"]
    torch.set_float32_matmul_precision(products[0] if products else "highest")
    tokenizer = build_tokenizer(config).to(device).train()
    objective = build_objective(config["loss"], tokenizer)
    settings = config["optimizer"]
    optimizer = build_optimizer(
        tokenizer, settings["lr"], settings["betas"], settings["weight_decay"]
    )
    images = torch.rand(case["batch"], tokenizer.channels, *tokenizer.image_size, device=device)
    kind = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[precision]
    autocast = torch.autocast(
        device.type, dtype=kind or torch.bfloat16, enabled=kind is not None, cache_enabled=False
    )  # as Lightning's
    forward = torch.compile(tokenizer.forward) if "compile" in words else tokenizer.forward

    def backward(forward: Callable[..., Any]) -> None:
        with autocast:
            output = forward(images * 2 - 1)
            total = objective(Step(images * 2 - 1, output, tokenizer))["total"]
        total.backward()

    def step() -> None:
        tokenizer.train()
        optimizer.zero_grad()
        backward(forward)
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        tokenizer.quantizer.after_step([optimizer])

    def encode() -> None:
        tokenizer.eval()
        with autocast:
            tokenizer.tokenize(images)

    for _ in range(2):  # starts the codebook, the moments and the compiler
        step()
    encode()
    peak = peak_mib(device)
    tokenizer.train()
    optimizer.zero_grad()
    # The fused attention kernels are not counted; the plain products of the same attention are.
    products, counter = Counter(), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), recording(products), counter:
        backward(tokenizer.forward)
    own, own_flops = replay(products, device)
    a, b, c = torch.randn(3, SIDE, SIDE, device=device, dtype=kind or torch.float32).unbind(0)

    def product() -> None:
        for _ in range(REPEATS):
            torch.mm(a, b, out=c)

    def operators() -> dict[str, float]:
        with torch.profiler.profile() as profiler:
            step()
        kind = f"self_{device.type}_time_total".replace("cuda", "device")
        return {event.key: getattr(event, kind) / 1e6 for event in profiler.key_averages()}

    calls: Calls = {"step": step, "encode": encode, "product": product, "own": own}
    if case["parts"]:
        calls["operators"] = operators
    return calls, {
        "flops": counter.get_total_flops(),
        "own_flops": own_flops,
        "peak_mib": peak,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
    }


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The experiment's config."""
    from vistok.core.configuration import compose, to_container

    return to_container(compose("train", [f"experiment={case['experiment']}", *case["overrides"]]))


def peak_mib(device: Any) -> float:
    """Most memory so far: of this process, or of the GPU's allocator."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------------- the step's own products


def recording(products: Counter) -> Any:
    """A context that counts matrix products by operation, shapes and layouts."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    kinds = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in kinds:
                operands = tuple((a.shape, a.stride(), a.dtype) for a in args)
                products[func, operands, tuple((kwargs or {}).items())] += 1
            return func(*args, **(kwargs or {}))

    return Recording()


def replay(products: Counter, device: Any) -> tuple[Callable[[], dict[str, float]], int]:
    """A call that does the products again, as often as the step does, and their operations.

    The call returns the seconds of each: name, rows x inner x columns, how often.
    """
    import torch

    work, flops = [], 0
    for (func, operands, options), count in products.items():
        tensors = [
            torch.zeros(shape, dtype=dtype, device=device)
            if 0 in stride
            else torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
            for shape, stride, dtype in operands
        ]
        result = func(*tensors, **dict(options))
        *batch, rows, columns = result.shape
        inner = tensors[-1].shape[-2]
        layout = "".join("NT"[t.stride(-1) > 1] for t in tensors[-2:])  # T: read transposed
        size = " x ".join(str(n) for n in (*batch, rows, inner, columns))
        name = f"{func.overloadpacket.__name__} {layout} {size}, {count} times"
        work.append((name, count, func.overloadpacket, tensors, {**dict(options), "out": result}))
        flops += 2 * count * result.numel() * inner

    def own() -> dict[str, float]:
        seconds: dict[str, float] = {}
        for name, count, func, tensors, options in work:
            begin = time.perf_counter()
            for _ in range(count):
                func(*tensors, **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return seconds

    return own, flops


def textbook(case: dict[str, Any]) -> tuple[Calls, dict[str, Any]]:
    """The step of a textbook's TiTok, and what it costs."""
    from textbook_titok import training_step

    step, flops = training_step(config_of(case), case["batch"], case["device"])
    return {"step": step}, {"flops": flops}


def official(case: dict[str, Any]) -> tuple[Calls, dict[str, Any]]:
    """Step and encode of the authors' code, and what they cost."""
    from official_llamagen import calls_of

    return calls_of(Path(case["official"]), config_of(case), case["batch"], case["device"])


# ---------------------------------------------------------------------- turns


def measure(cases: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Numbers of each case; all of them take turns."""
    context = mp.get_context("spawn")
    pipes, names, facts = [], [], []
    for case in cases:
        pipe, other = context.Pipe()
        context.Process(target=serve, args=(case, other), daemon=True).start()
        other.close()
        pipes.append(pipe)
    for pipe in pipes:
        said = pipe.recv()
        names.append(said[0])
        facts.append(said[1])
    times: list[dict[str, list[float]]] = [{name: [] for name in calls} for calls in names]
    parts: list[dict[str, list[dict[str, float]]]] = [{"own": [], "operators": []} for _ in cases]
    start = time.perf_counter()
    while len(times[0]["step"]) < 3 or time.perf_counter() - start < seconds:
        for pipe, own, inside in zip(pipes, times, parts, strict=True):
            for name, list_ in own.items():
                pipe.send(name)
                spent, each = pipe.recv()
                list_.append(spent)
                if name in inside:
                    inside[name].append(each)
    for pipe in pipes:
        pipe.send(None)
    medians = [{name: statistics.median(ts) for name, ts in own.items()} for own in times]
    others = {
        case["precision"]: times
        for case, times in zip(cases, medians, strict=True)
        if case["precision"] in ("textbook", "official")
    }
    rows = [row(*each, others) for each in zip(cases, medians, facts, strict=True)]
    for case, line, inside in zip(cases, rows, parts, strict=True):
        if case["parts"]:
            line["parts"] = {
                name: {
                    key: statistics.median(turn.get(key, 0.0) for turn in turns) for key in turns[0]
                }
                for name, turns in inside.items()
                if turns
            }
    return rows


def row(
    case: dict[str, Any],
    spent: dict[str, float],
    facts: dict[str, Any],
    others: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Return one line of the table; `others` are the times that it is compared with."""
    batch, flops = case["batch"], facts["flops"]
    values = {
        "experiment": case["experiment"],
        "precision": case["precision"],
        "batch": batch,
        "step_s": spent["step"],
        "images_per_s": batch / spent["step"],
        "gflop_per_image": flops / batch / 1e9,
        "gflops": flops / spent["step"] / 1e9,
        **facts,
    }
    for name, times in others.items():
        values[f"times_{name}"] = times["step"] / spent["step"]
        if "encode" in times and "encode" in spent:
            values[f"encode_times_{name}"] = times["encode"] / spent["encode"]
    if "encode" in spent:
        values["encode_images_per_s"] = batch / spent["encode"]
    if "product" in spent:
        values["product_gflops"] = 2 * REPEATS * SIDE**3 / spent["product"] / 1e9
        values["own_products_gflops"] = facts["own_flops"] / spent["own"] / 1e9
        values["share"] = values["gflops"] / values["product_gflops"]
        values["share_of_own"] = values["gflops"] / values["own_products_gflops"]
    return values


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [[name for name, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [
        [form.format(row[name]) if name in row else "" for name, form in COLUMNS] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def longest(parts: dict[str, float]) -> str:
    """Markdown: milliseconds of what takes longest, and of the rest together."""
    order = sorted(parts.items(), key=lambda part: -part[1])
    order = [*order[:SHOWN], ("the rest", sum(spent for _, spent in order[SHOWN:]))]
    return "\n".join(["| | ms |", "|---|---|", *(f"| {k} | {1e3 * s:.1f} |" for k, s in order)])


def is_titok(experiment: str, overrides: list[str]) -> bool:
    """Whether an experiment's tokenizer is one that `textbook` can be built in the sizes of."""
    sizes = config_of({"experiment": experiment, "overrides": overrides})["tokenizer"]
    return sizes["_target_"] == "titok"


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
        precisions = values["precisions"].split(",")
        if values["textbook"] == "true" and is_titok(experiment, overrides):
            precisions.append("textbook")
        if values["official"]:
            precisions.append("official")
        cases = [
            {
                "experiment": experiment,
                "precision": precision,
                "batch": int(values["batch"]),
                "device": values["device"],
                "threads": int(values["threads"]),
                "parts": values["parts"] == "true" and precision not in ("textbook", "official"),
                "official": values["official"],
                "clock": values["clock"],
                "overrides": overrides,
            }
            for precision in precisions
        ]
        rows += measure(cases, float(values["seconds"]))
    print(table(rows))
    for line in rows:
        for name, parts in line.get("parts", {}).items():
            what = {"own": "own products", "operators": "operators of a step"}[name]
            print(f"\n{line['experiment']}, {line['precision']}: {what}\n\n{longest(parts)}")
    if values["out"]:
        Path(values["out"]).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
