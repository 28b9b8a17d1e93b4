"""Try out a training before anyone spends days on it: `vistok doctor`."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vistok.core import configuration as c
from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.core.files import replacing
from vistok.core.plugins import import_plugins
from vistok.core.ranks import is_first_process
from vistok.core.registry import resolve
from vistok.core.terminal import columns, counted, show, typed, wrapped
from vistok.core.values import Count, NonNegative, check, is_whole
from vistok.core.words import quoted, take_folders
from vistok.training.callbacks import StepClock
from vistok.training.run import train

_WARM = 3  # steps at the beginning of a phase that are slower, for memory and kernels are found


def diagnose(
    config: dict[str, Any],
    words: Sequence[str],
    steps: int = 200,
    cost_per_hour: float = 0.0,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train for a few steps; return what the whole run would need, and how it does.

    Terms that start later in the run start halfway through, so that what they cost is known. The
    learning rate is that of the beginning of the whole run.

    Args:
        config: of the run, as composed.
        words: `key=value` that it was composed with.
        steps: optimizer steps, 16 or more.
        cost_per_hour: of the machines together, in any currency.
        keep: folder to leave the short run in; None to remove it.

    Raises:
        ConfigError: if `steps` is too small.
    """
    if not is_whole(steps) or steps < 4 * (_WARM + 1):
        raise ConfigError(f"steps={steps}: must be a whole number, {4 * (_WARM + 1)} or more")
    short, late, total, per_step = shortened(config, steps)
    clock = StepClock()
    folder = keep or Path(tempfile.mkdtemp(prefix="vistok_doctor_"))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        task = resolve(short.get("task", "reconstruction"), kind="task", key="task")
        summary = train(task, short, folder, words=list(words), watch=[clock])
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = [s for _, s in clock.steps]
    half = len(seconds) // 2
    before = statistics.median(seconds[_WARM:half])
    after = statistics.median(seconds[half + _WARM :]) if late else before
    first = min(late.values(), default=total)
    training = (first * before + (total - first) * after) / per_step
    validations = total / per_step // config["trainer"]["val_check_interval"]
    hours = (training + validations * clock.validation_seconds) / 3600
    report = {
        "steps": len(seconds),
        "images_per_step": per_step,
        "images_per_second": per_step / after,
        "images_per_second_before_late_terms": per_step / before,
        "late_terms": late,
        "data_wait_share": clock.wait_share,
        **memory(),
        "total_samples": total,
        "hours": hours,
        "cost": hours * cost_per_hour,
        "skipped_steps": summary["skipped_steps"],
        "codebook_usage": summary.get("codebook_usage"),
        "health": summary["health"],
        "alarms": summary["alarms"],
    }
    report["advice"] = advice(report, late)
    return report


def shortened(
    config: dict[str, Any], steps: int
) -> tuple[dict[str, Any], dict[str, int], int, int]:
    """Return the config of a short run like the beginning of a long one.

    Returns:
        The config; the starts, in samples of the long run, of terms that start after the short one;
        the samples of the long run; those of a step.
    """
    short = copy.deepcopy(config)
    trainer, optimizer = short["trainer"], short["optimizer"]
    ranks = trainer["devices"]
    if not is_whole(ranks):
        gpus = torch.cuda.device_count() if trainer["accelerator"] != "cpu" else 0
        ranks = len(ranks) if isinstance(ranks, list) else max(1, gpus)
    ranks *= trainer["num_nodes"]
    own = short["data"]["batch_size"] * trainer["accumulate_grad_batches"] * ranks
    per_step = int(trainer.get("global_batch_size") or own)
    total = trainer["max_steps"] * per_step
    optimizer["total_samples"] = optimizer["total_samples"] or total
    late = {}
    for name, options in (short.get("loss") or {}).get("terms", {}).items():
        if not isinstance(options, dict):
            continue
        start = options.get("start_samples") or 0
        start = start or round((options.get("start") or 0) * optimizer["total_samples"])
        if start >= steps * per_step:
            late[name] = min(start, total)
            options |= {"start_samples": steps // 2 * per_step, "start": 0.0, "ramp_samples": 1}
            for key in {"warmup", "warmup_samples"} & options.keys():
                options[key] = 0
    trainer |= {"max_steps": steps, "val_check_interval": steps, "enable_progress_bar": False}
    short["callbacks"] |= {
        "checkpoint_every": steps + 1,
        "num_pictures": 0,
        "codebook_window": max(1, steps // 4),
        "health_every": max(1, steps // 8),
    }
    short["baseline"] = None
    short["logger"] = {"name": "jsonl"}
    return short, late, total, per_step


def memory() -> dict[str, Any]:
    """Return the peak of memory in GiB: of this process, and of its GPU."""
    unit = 1024 if sys.platform != "darwin" else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    found: dict[str, Any] = {"memory_gib": round(peak, 3)}
    if torch.cuda.is_available():
        _, whole = torch.cuda.mem_get_info()
        found["gpu_memory_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        found["gpu_memory_of_gib"] = round(whole / 2**30, 3)
    return found


def advice(report: dict[str, Any], late: dict[str, int]) -> list[str]:
    """Return what to change, a line each."""
    found = [alarm.partition(": ")[2] for alarm in report["alarms"]]
    if report["data_wait_share"] > 0.2:
        found.append(
            f"{report['data_wait_share']:.0%} of the time goes to waiting for data: raise "
            "data.num_workers, or see vistok bench-data"
        )
    if report["skipped_steps"]:
        found.append(
            f"{report['skipped_steps']} of {report['steps']} steps were not finite: lower "
            "optimizer.lr, raise optimizer.warmup_samples, or set trainer.precision=32"
        )
    if (report["codebook_usage"] or 1) < 0.3:
        found.append(
            f"{report['codebook_usage']:.0%} of the codes are in use: see the alarm above, or try "
            "another quantizer"
        )
    used, of = report.get("gpu_memory_gib"), report.get("gpu_memory_of_gib")
    if used and of and used > 0.92 * of:
        found.append("little GPU memory is left: lower data.batch_size; accumulation makes up")
    elif used and of and used < 0.5 * of:
        found.append("half of the GPU memory is free: data.batch_size can be doubled")
    norms = {k: v for k, v in report["health"].items() if k.startswith("gradient/")}
    pixels = norms.get("gradient/reconstruction")
    for name, norm in norms.items():
        term = name.partition("/")[2]
        if pixels and term in late and norm > 10 * pixels:
            found.append(
                f"the gradient of {term} is {norm / pixels:.0f} times that of the reconstruction: "
                f"lower loss.terms.{term}.weight, or set loss.terms.{term}.adaptive=picture"
            )
    return found


def write(report: dict[str, Any], out: Path) -> None:
    """Write the report as JSON and print it; on the first rank alone."""
    if not is_first_process():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    rows = {
        "memory": f"{report['memory_gib']:.2f} GiB",
        "speed": f"{report['images_per_second']:.1f} images/s",
        "whole run": f"{counted(report['total_samples'], 'image')} in {report['hours']:.3g} h",
        "cost": f"{report['cost']:.2f}" if report["cost"] else "set cost_per_hour=",
        "waiting for data": f"{report['data_wait_share']:.0%}",
        "skipped steps": str(report["skipped_steps"]),
    }
    if "gpu_memory_gib" in report:
        rows["GPU memory"] = f"{report['gpu_memory_gib']} of {report['gpu_memory_of_gib']} GiB"
    rows |= {name: f"{value:.4g}" for name, value in report["health"].items()}
    say(columns(rows.items()))
    for line in report["advice"] or ["nothing to change was found"]:
        say(f"advice: {line}")
    say(f"report: {out}")


#: Own words, next to those of a training: default and meaning.
_OPTIONS = {
    "steps": ("200", "optimizer steps to try, 16 or more"),
    "cost_per_hour": ("0", "of all machines together, for an estimate of the cost"),
    "out": ("doctor.json", "the report"),
    "keep": ("", "a folder to keep the short run in; empty: it is removed"),
}


def TOOL(argv: Sequence[str]) -> int:
    """Run `vistok doctor` with these words; return the exit code."""
    if not argv or {"-h", "--help", "help"} & set(argv):
        show(_help())
        return 0 if argv else 2
    own = {name: default for name, (default, _) in _OPTIONS.items()}
    overrides = []
    others, folders = take_folders(argv)
    for word in others:
        name, equals, value = word.partition("=")
        if equals and name in own:
            own[name] = value
        elif equals or word.startswith("~"):
            if word.lower() not in ("debug=true", "debug=false"):
                overrides.append(quoted(word))
        else:
            raise ConfigError(f"{word}: expected key=value; --help shows an example")
    for name, kind in (("steps", Count), ("cost_per_hour", NonNegative)):
        check(name, _number(own[name]), kind)
    config, _, words = c.compose_run(overrides, folders)
    import_plugins(config["plugins"])
    keep = Path(own["keep"]) if own["keep"] else None
    report = diagnose(config, words, int(own["steps"]), float(own["cost_per_hour"]), keep)
    write(report, Path(own["out"]))
    return 0


def _help() -> str:
    program = typed("doctor")
    rows = [(f"{name}={default}", about) for name, (default, about) in _OPTIONS.items()]
    rows.append(("debug=true", "show the traceback of an error"))
    parts = (
        wrapped(
            "Try out a training: memory, images per second, time and cost of the whole run, "
            "health, and advice. Terms that start later start halfway through."
        ),
        f"  {program} [key=value ... as in training]",
        "Options\n" + columns(rows),
        f"Example\n  {program} experiment=NAME data=shards data.train=x.tar cost_per_hour=24",
    )
    return "\n\n".join(parts)


def _number(text: str) -> int | float | str:
    """Return the number that a text says, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
