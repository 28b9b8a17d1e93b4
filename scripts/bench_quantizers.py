"""Measure time and memory of the quantizers, next to other implementations of the same methods.

    python scripts/bench_quantizers.py                                   # all; an hour and a half
    python scripts/bench_quantizers.py methods=vq,simvq sizes=8192x32 out=bench.json
    python scripts/bench_quantizers.py methods=ibq sizes=131072x256 tokens=256  # an image of 256 px
    python scripts/bench_quantizers.py methods=peaks                     # memory of all configs

Keys: `methods` (of METHODS below), `sizes` (codes x channels, for the codebook methods), `tokens`,
`codes` (for `peaks`), `rounds`, `threads`, `memory_gb` (limit per process; what needs more is "out
of memory") and `out` (a JSON file; its other cases are kept). `vqp` is vector-quantize-pytorch,
`textbook` the usual few lines with a distance matrix and one-hots, `matmul` the product that an
exact search cannot avoid, `matmul_reused` the same into memory that is there already.

A train step is forward, backward and `after_step`; encode is eval mode, ids only. Every
contender of a case lives in a separate process, and the processes take turns, one step each
per round (or as many as take 0.1 s), so that a busy machine disturbs all alike. Figures are the
best of the rounds, ratios those of processor time, which other work disturbs least; `threads=1`
leaves out the threads' waiting for each other. Memory is the peak of the first full step above
what the process held before it, gradients included. `peaks` is that of a train step of every
shipped config that takes a `codebook_size`, set to `codes` (65536): at the width of its codes, and
at 256 channels where it has one codebook.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from bench_contenders import (
    CODEBOOK_METHODS,
    FIXED,
    METHODS,
    ONE_CODEBOOK,
    VARIANTS,
    WIDTHS,
    Step,
    contenders,
    ours,
    shipped,
)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tokenizers"))

SIZES = [f"{k}x{d}" for d in (8, 32, 256) for k in (1024, 8192, 16384, 65536, 262144)]
SOME_SIZES = ["1024x8", "8192x32", "16384x256"]  # for the variants of one method
SHORTEST_TURN = 0.1  # seconds; shorter steps are repeated, or waking up would be most of them
TURN_BUDGET = 20.0  # seconds that one contender may use in a case before its rounds end

# ---------------------------------------------------------------------- measuring


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_of(step: Step, z: Tensor) -> float:
    """Peak memory of one step above what is held before it, in MB."""
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step(z)
    return resident("VmHWM") - before


def serve(connection, build, args, options, width, tokens, threads, memory_gb) -> None:
    """A contender: answers "train" and "encode" with the time of one step, until "stop"."""
    torch.set_num_threads(threads)
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        torch.manual_seed(0)
        train, encode = build(*args, **options)
        # Latents near codes of unit scale, as in training; all contenders see the same ones.
        z = torch.randn(tokens, width).requires_grad_()
        train(z[:64].detach().requires_grad_())
        held = peak_of(train, z)
        z.grad = None
        with torch.no_grad():
            encode(z[:64].detach())
            answer: object = {"memory_mb": held, "encode_mb": peak_of(encode, z.detach())}
        while True:
            connection.send(answer)
            command = connection.recv()
            if command == "stop":
                return
            wall, cpu, steps = time.perf_counter(), time.process_time(), 0
            while not steps or time.perf_counter() - wall < SHORTEST_TURN:
                if command == "train":
                    z.grad = None
                    train(z)
                else:
                    with torch.no_grad():
                        encode(z.detach())
                steps += 1
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            answer = wall / steps, cpu / steps
    except Exception as error:
        known = "memory" in str(error) or isinstance(error, MemoryError)
        connection.send("out of memory" if known else f"failed: {error}")


def launch(contender: tuple, width: int, options: dict) -> tuple:
    """Start a process that serves a contender; its first answer is the memory of a step."""
    context = mp.get_context("forkserver")
    here, there = context.Pipe()
    shared = (width, options["tokens"], options["threads"], options["memory_gb"])
    process = context.Process(target=serve, args=(there, *contender, *shared))
    process.start()
    there.close()
    return here, process


def measure(method: str, size: str, options: dict) -> dict:
    """One case: every contender in its own process, steps in turn."""
    codes, dim = (int(part) for part in size.split("x")) if method in CODEBOOK_METHODS else (0, 0)
    results: dict[str, dict] = {}
    alive = {}
    for name, contender in contenders(method, dim, codes, options["tokens"]).items():
        connection, process = launch(contender, WIDTHS.get(method, dim), options)
        answer = receive(connection)
        if isinstance(answer, dict):
            results[name] = answer
            alive[name] = connection, process
        else:
            results[name] = {"error": str(answer)}
    times: dict = {name: {"train": [], "encode": []} for name in alive}
    for _ in range(options["rounds"]):
        for name, (connection, _) in alive.items():
            if sum(wall for kind in times[name].values() for wall, _ in kind) > TURN_BUDGET:
                continue
            for kind in ("train", "encode"):
                connection.send(kind)
                answer = receive(connection)
                if isinstance(answer, tuple):
                    times[name][kind].append(answer)
                else:
                    results[name]["error"] = str(answer)
    for name, (connection, process) in alive.items():
        if "error" not in results[name]:
            connection.send("stop")
        process.join()
        for kind, pairs in times[name].items():
            if pairs:
                results[name][f"{kind}_ms"] = 1e3 * min(wall for wall, _ in pairs)
                results[name][f"{kind}_cpu_ms"] = 1e3 * min(cpu for _, cpu in pairs)
    return results


def peaks(options: dict) -> dict[str, str]:
    """Config and width -> MB of a train step with many codes, or an error."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "configs" / "quantizer").glob("*.yaml")):
        config = shipped(path.stem, 256)
        if "codebook_size" not in config or path.stem.startswith("token_bridge"):
            continue  # a grid, or levels of single channels
        overrides: dict = {"codebook_size": options["codes"]}
        if "kmeans_init" in config:
            overrides["kmeans_init"] = False
        widths = [config.get("codebook_dim")]
        if path.stem.startswith(ONE_CODEBOOK):
            widths.append(256)
        for width in widths:
            extra = overrides | ({"codebook_dim": width} if width else {})
            connection, process = launch((ours, (path.stem, 256), extra), 256, options)
            answer = receive(connection)
            if isinstance(answer, dict):
                connection.send("stop")
                answer = f"{answer['memory_mb']:.0f}"
            process.join()
            found[f"{path.stem} {width or ''}".strip()] = str(answer)
            print(f"| {path.stem} | {width or ''} | {answer} |", flush=True)
    return found


def receive(connection) -> object:
    """The answer of a contender."""
    try:
        return connection.recv()
    except EOFError:  # killed by the kernel
        return "out of memory"


# ---------------------------------------------------------------------- report


def table(cases: dict[str, dict]) -> str:
    """Markdown, one row per contender; ratios of processor time are to ours in the same case."""
    lines = [
        "| method | size | who | train ms | cpu | × ours | peak MB "
        "| encode ms | cpu | × ours | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, results in cases.items():
        base = results.get("ours", {})
        for name, row in results.items():
            cells = [*key.split(" "), name]
            for kind in ("train", "encode"):
                if "error" in row:
                    cells += ["", "", "", ""] if kind == "train" else [row["error"][:40], *[""] * 3]
                    continue
                time, cpu = row.get(f"{kind}_ms", 0.0), row.get(f"{kind}_cpu_ms", 0.0)
                own = base.get(f"{kind}_cpu_ms")
                if kind == "train" and name.startswith("matmul"):
                    cells += ["", "", ""]
                else:
                    cells += [f"{time:.3g}", f"{cpu:.3g}", f"{cpu / own:.2f}" if own else ""]
                cells.append(f"{row['memory_mb' if kind == 'train' else 'encode_mb']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(options: dict) -> dict:
    """What the figures were measured on."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "torch": torch.__version__,
        **options,
    }


def main() -> None:
    """Parse key=value arguments, measure, print and write."""
    # Processes fork from one that has imported the libraries and computed nothing.
    mp.get_context("forkserver").set_forkserver_preload(
        ["torch", "hydra", "vector_quantize_pytorch"]
    )
    options: dict = {
        "tokens": 8192,
        "codes": 65536,
        "rounds": 5,
        "threads": os.cpu_count(),
        "memory_gb": 10.0,
    }
    chosen = {"methods": ",".join(METHODS), "sizes": "", "out": ""}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key in chosen:
            chosen[key] = value
        elif key in options:
            options[key] = type(options[key])(value)
        else:
            sys.exit(f"unknown key {key!r}; known: {', '.join([*chosen, *options])}")
    out = Path(chosen["out"]) if chosen["out"] else None
    report: dict = {"cases": {}}
    if out and out.exists():
        report = json.loads(out.read_text())
    report["machine"] = machine(options)
    methods = chosen["methods"].split(",")
    for method in methods:
        if method not in (*METHODS, "peaks"):
            sys.exit(f"unknown method {method!r}; known: {', '.join((*METHODS, 'peaks'))}")
    for method in methods:
        sizes = [FIXED.get(method)]
        if method in CODEBOOK_METHODS:
            some = SOME_SIZES if method in VARIANTS else SIZES
            sizes = chosen["sizes"].split(",") if chosen["sizes"] else some
        for size in sizes:
            if method == "peaks":
                report[f"peaks {options['codes']}"] = peaks(options)
            else:
                results = measure(method, size, options)
                report["cases"][f"{method} {size}"] = results
                print(table({f"{method} {size}": results}), flush=True)
            if out:
                out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
