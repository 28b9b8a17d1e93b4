"""The run folder: what ran, what it says at its start, and what it reached."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

import vistok
from vistok.core.console import say
from vistok.core.files import replacing
from vistok.training.data import TrainingData
from vistok.training.task import Task
from vistok.training.trainer import in_words


@rank_zero_only
def write_run_files(config: dict[str, Any], folder: Path) -> None:
    """The resolved config, the versions and the command."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("config.yaml", yaml.safe_dump(config, sort_keys=False)),
        ("versions.json", json.dumps(versions(), indent=2) + "\n"),
    ):
        with replacing(folder / name) as file:
            file.write(text.encode())
    with open(folder / "command.txt", "a") as file:
        file.write(shlex.join(sys.argv) + "\n")


def versions() -> dict[str, Any]:
    """Versions of what computed a result."""
    names = ("torch", "lightning", "hydra-core", "timm", "webdataset", "torchmetrics", "numpy")
    return {
        "vistok": vistok.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Commit of the checkout that runs, with + for uncommitted changes; None if it is installed."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@rank_zero_only
def announce(
    task: Task,
    data: TrainingData,
    trainer: L.Trainer,
    folder: Path,
    resume: Path | None,
) -> None:
    """Say in a few lines what this run is."""
    verb = f"resuming {resume}" if resume is not None else "training"
    say(
        f"vistok {vistok.__version__} ({Path(vistok.__file__).parent})\n"
        f"{verb}: {task.description()}\n"
        f"data: {data.in_words()}\n"
        f"trainer: {in_words(trainer, data.batch_size)}\n"
        f"run folder: {folder}"
    )


@rank_zero_only
def finish(summary: dict[str, Any], task: Task, data: TrainingData, folder: Path) -> None:
    """Write `summary.json` and print it."""
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps({**summary, "data": data.describe()}, indent=2) + "\n").encode())
    table = Table(title=f"{folder}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        if isinstance(value, (dict, list)) and not value:
            continue  # no alarms, no health that was measured
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    say(table)
    if report := data.skipped_report():
        say(f"[yellow]{report}[/yellow]")
    commands = "\n      ".join(task.next_commands(folder))
    say(f"pictures: {folder}/pictures\nnext: {commands}")
