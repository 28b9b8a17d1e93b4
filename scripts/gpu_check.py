"""Check a GPU in ten minutes: speed, memory, attention kernels, and agreement with the CPU.

    python scripts/gpu_check.py out=gpu.json                  # on the first GPU
    python scripts/gpu_check.py out=gpu.json minutes=5 presets=titok_l32,vqgan_f16
    python scripts/gpu_check.py tiny=true device=cpu          # whether the script itself works

Prints tables in Markdown and writes what it has to `out` after each section, so a run that is ended
early keeps what it measured. Needs neither data nor weights: both are random.

- `steps`: training steps of four presets in float32, bf16, and bf16 with `compile=true`, next to a
  textbook TiTok: images/s, peak memory, and the share of the device's bf16 products (`mfu`).
- `attention`: forward and backward under a causal mask, dense and by FlexAttention.
- `encode`: `tokenize` with an IBQ of 131 072 codes at 256 and 512 px, images/s and peak memory,
  next to what a matrix of all distances would take.
- `agreement`: ids and pictures of the GPU next to the CPU's, from the same weights in float32.

Keys: `presets` (experiments between commas), `batch`, `minutes` (for all sections; what does not
fit is left out and named), `sections`, `device`, `peak_tflops` (dense bf16 of the device's data
sheet, where it is not in the list of this file), `tiny` (tiny sizes) and `out`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tokenizers"), str(ROOT / "scripts")]

DEFAULTS = {
    "presets": "titok_l32,gigatok_s_b,one_d_piece_b256,vqgan_f16",
    "batch": "32",
    "minutes": "10",
    "sections": "steps,attention,encode,agreement",
    "device": "cuda",
    "peak_tflops": "",
    "tiny": "false",
    "out": "gpu_check.json",
}

#: Dense bf16 TFLOP/s of data sheets, by a part of the device's name.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "B200": 2250}

#: Sizes of `tiny=true`.
TINY_PRESETS = "titok_tiny,vqgan_tiny"
TINY_WORDS = [
    "data.image_size=16",
    "quantizer.codebook_size=16",
    "quantizer.codebook_dim=8",
]

Row = dict[str, Any]


class Clock:
    """How much of the time is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Return the seconds that are left, 0 at least."""
        return max(0.0, self.end - time.monotonic())


def steps(settings: Mapping[str, Any], clock: Clock) -> list[Row]:
    """Measure training steps of the presets."""
    import bench_training

    rows: list[Row] = []
    tiny = settings["tiny"]
    presets = (TINY_PRESETS if tiny else settings["presets"]).split(",")
    precisions = ["32", "bf16"] if tiny else ["32", "bf16", "bf16+compile"]
    for number, preset in enumerate(presets):
        share = 0.6 * clock.left() / (len(presets) - number)
        if share < 5 and not tiny:
            rows.append({"experiment": preset, "precision": "left out: no time"})
            continue
        words = TINY_WORDS if tiny else []
        textbook = bench_training.is_titok(preset, words) and not tiny
        cases = [
            {
                "experiment": preset,
                "precision": precision,
                "batch": 2 if tiny else int(settings["batch"]),
                "device": settings["device"],
                "threads": 0,
                "clock": "wall",
                "parts": False,
                "overrides": words,
            }
            for precision in [*precisions, *(["textbook"] if textbook else [])]
        ]
        rows += bench_training.measure(cases, 0 if tiny else min(20.0, share / 4))
    peak = peak_tflops(settings)
    for row in rows:
        if peak and row.get("gflops") and "bf16" in row["precision"]:
            row["mfu"] = row["gflops"] / 1e3 / peak
    return rows


def peak_tflops(settings: Mapping[str, Any]) -> float | None:
    """Return the device's dense bf16 TFLOP/s, if they are given or known."""
    import torch

    if settings["peak_tflops"]:
        return float(settings["peak_tflops"])
    if settings["device"] != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def attention(settings: Mapping[str, Any], clock: Clock) -> list[Row]:
    """Measure attention under a causal mask, dense and by FlexAttention."""
    import torch

    from vistok.nn.attention import attend, in_blocks

    device = settings["device"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    for length in (128,) if settings["tiny"] else (256, 512, 1024, 2048):
        heads = (1, 2) if settings["tiny"] else (16, 16)
        q, k, v = torch.randn(3, *heads, length, 64, device=device, dtype=dtype)
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        row: Row = {"length": length}
        for name, given in (("dense", mask), ("flex", in_blocks(mask, length))):
            if name == "flex" and device == "cpu":
                continue  # has no gradient there
            parts = [x.clone().requires_grad_() for x in (q, k, v)]

            def both(given: Any = given, parts: Any = parts) -> None:
                attend(*parts, given).sum().backward()

            row[f"{name}_ms"] = 1e3 * seconds_of(both, device)
        rows.append(row)
        if not clock.left():
            break
    return rows


def encode(settings: Mapping[str, Any], clock: Clock) -> list[Row]:
    """Measure bulk encoding with a large codebook."""
    import torch

    from vistok.core.configuration import compose, to_container
    from vistok.models.build import build_tokenizer

    device, tiny = torch.device(settings["device"]), settings["tiny"]
    rows = []
    for side in (32, 64) if tiny else (256, 512):
        codes = 1024 if tiny else 131072
        preset = "vqgan_tiny" if tiny else "vqgan_f16"
        words = [f"experiment={preset}", "quantizer=ibq", f"quantizer.codebook_size={codes}"]
        config = to_container(compose("train", [*words, f"data.image_size={side}"]))
        torch.manual_seed(0)
        tokenizer = build_tokenizer(config).to(device).eval()
        batch = 2 if tiny else max(1, int(settings["batch"]) * 256**2 // side**2)
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with torch.no_grad(), bf16:
            spent = seconds_of(lambda: tokenizer.tokenize(images), device.type)  # noqa: B023
        row = {
            "image_size": side,
            "codes": codes,
            "batch": batch,
            "images_per_s": batch / spent,
            "matrix_mib": batch * tokenizer.num_tokens * codes * 4 / 2**20,
        }
        if device.type == "cuda":
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append(row)
        if not clock.left():
            break
    return rows


def agreement(settings: Mapping[str, Any], clock: Clock) -> list[Row]:
    """Compare ids and pictures with the CPU's."""
    import torch

    from vistok.core.configuration import compose, to_container
    from vistok.models.build import build_tokenizer

    tiny = settings["tiny"]
    rows = []
    for preset in (TINY_PRESETS if tiny else settings["presets"]).split(","):
        if rows and not clock.left():
            break
        words = [f"experiment={preset}", *(TINY_WORDS if tiny else [])]
        torch.manual_seed(0)
        tokenizer = build_tokenizer(to_container(compose("train", words))).eval()
        height, width = tokenizer.image_size
        images = torch.rand(2, tokenizer.channels, height, width)
        with torch.no_grad():
            ids = tokenizer.tokenize(images)
            pictures = tokenizer.detokenize(ids)
            moved = tokenizer.to(settings["device"])
            there = moved.tokenize(images.to(settings["device"]))
            painted = moved.detokenize(ids.to(settings["device"]))
        rows.append(
            {
                "experiment": preset,
                "ids_equal": (there.cpu() == ids).float().mean().item(),
                "largest_difference": (painted.cpu() - pictures).abs().max().item(),
            }
        )
    return rows


def seconds_of(call: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """Return the median seconds of a call, after two to warm up."""
    import torch

    spent = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[2:])


SECTIONS = {"steps": steps, "attention": attention, "encode": encode, "agreement": agreement}


#: Keys of the JSON that the tables leave out.
HIDDEN = ("flops", "own_flops", "threads", "torch", "device", "gflop_per_image", "share_of_own")


def table(rows: Sequence[Row], hidden: Sequence[str] = ()) -> str:
    """Return rows as Markdown, with a column for each key."""
    keys = [k for k in dict.fromkeys(key for row in rows for key in row) if k not in hidden]
    lines = [keys, ["---"] * len(keys)]
    for row in rows:
        values = [row.get(key, "") for key in keys]
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(words: Sequence[str]) -> int:
    """Measure, print tables, write the JSON."""
    import torch

    settings: dict[str, Any] = dict(DEFAULTS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in settings:
            print(f"error: {word}: expected one of {', '.join(DEFAULTS)}", file=sys.stderr)
            return 2
        settings[key] = value
    settings["tiny"] = settings["tiny"] == "true"
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        print("error: device=cuda: no GPU was found; device=cpu tiny=true tries the script")
        return 2
    clock = Clock(float(settings["minutes"]))
    result: dict[str, Any] = {"torch": torch.__version__, "device": settings["device"]}
    if settings["device"] == "cuda":
        result["device"] = torch.cuda.get_device_name()
        result["peak_tflops"] = peak_tflops(settings)
    for name in settings["sections"].split(","):
        if not clock.left():
            print(f"\n{name}: left out, no time")
            continue
        try:
            result[name] = SECTIONS[name](settings, clock)
        except Exception as error:  # one section must not cost the others
            result[name] = []
            result[f"{name}_error"] = f"{type(error).__name__}: {error}"[:500]
        print(f"\n{name}\n\n{table(result[name], HIDDEN)}", flush=True)
        if f"{name}_error" in result:
            print(result[f"{name}_error"])
        Path(settings["out"]).write_text(json.dumps(result, indent=2) + "\n")
    return int(any(key.endswith("_error") for key in result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
