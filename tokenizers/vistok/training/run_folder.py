"""The run folder: what ran, what it says at its start, and what it reached."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from torch.distributed.tensor import DTensor

import vistok
from vistok.core.console import say
from vistok.core.errors import CheckpointError
from vistok.core.files import replacing
from vistok.core.run_folders import leads, remove_run
from vistok.core.terminal import counted, show
from vistok.core.values import is_number
from vistok.training.callbacks import RandomState, random_state, set_random_state
from vistok.training.data import TrainingData
from vistok.training.lightning_internals import children_of
from vistok.training.peers import Peers
from vistok.training.task import Task
from vistok.training.trainer import in_words


class BeginRun(L.Callback):
    """Writes the first files of a run once nothing can be refused any more.

    Until then a resumed run is as it was, and so is a run that is to be replaced.

    Args:
        config: of the run.
        folder: of the run.
        resume: checkpoint that it continues from, if any.

    Attributes:
        begun: whether training has begun.
        peers: the processes of the ranks.
        seconds_before: that earlier calls have trained this run.
    """

    def __init__(self, config: dict[str, Any], folder: Path, resume: Path | None) -> None:
        self.config = {**config, "overwrite": False}
        self.replaces = bool(config.get("overwrite")) and resume is None
        self.folder = folder
        self.resume = resume
        self.begun = False
        self.peers = Peers()
        self.seconds_before = 0.0
        self._since = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Check what has been restored, then write."""
        if self.resume is not None:
            check_moments(trainer, self.resume)
            check_random_states(trainer)
        _ = module.lr_schedule  # which may be refused
        self.peers.meet(children_of(trainer))
        if trainer.is_global_zero:
            if self.replaces:
                remove_run(self.folder)
            write_run_files(self.config, self.folder)
            if module.schedule_note:
                say(f"[yellow]{module.schedule_note}[/yellow]")
        self.begun = True

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of all calls so far."""
        return {"seconds": self.seconds_before + time.monotonic() - self._since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a number that cannot be is as good as none."""
        seconds: Any = state_dict.get("seconds")
        self.seconds_before = float(seconds) if is_number(seconds) and seconds >= 0 else 0.0


def check_random_states(trainer: L.Trainer) -> None:
    """Try the random states that are restored at the first step; what is wrong raises."""
    before = random_state()
    try:
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, RandomState) and callback.pending is not None:
                set_random_state(callback.pending)
    finally:
        set_random_state(before)


def check_moments(trainer: L.Trainer, source: Path) -> None:
    """Raise unless the moments that an optimizer has restored fit its parameters.

    Raises:
        CheckpointError: naming the optimizer.
    """
    for number, optimizer in enumerate(trainer.optimizers):
        place = f"{source}: optimizer_states[{number}]"
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state.get(name) if isinstance(state, dict) else None
                if not isinstance(moment, torch.Tensor) or moment.shape != parameter.shape:
                    raise CheckpointError(f"{place}: {name} does not fit its parameter")
                local = moment.to_local() if isinstance(moment, DTensor) else moment
                if not torch.isfinite(local).all():
                    raise CheckpointError(f"{place}: {name} holds NaN or infinite numbers")
        for group in optimizer.param_groups:
            for name in ("lr", "weight_decay", "eps"):
                if not is_number(group.get(name)) or group[name] < 0:
                    raise CheckpointError(f"{place}: {name}={group.get(name)} must be 0 or more")


def tell(text: str) -> None:
    """Say on the first rank what comes next, where it may take long."""
    if leads():
        show(text)


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
        f"{verb}: {task.description()}\n"
        f"data: {data.in_words()}\n"
        f"trainer: {in_words(trainer, data.batch_size)}\n"
        f"run folder: {folder}"
    )


@rank_zero_only
def finish(summary: dict[str, Any], task: Task, data: TrainingData, folder: Path) -> None:
    """Write `summary.json` and print it.

    Args:
        summary: what the run reached.
        task: that was trained.
        data: that it was measured on.
        folder: of the run.
    """
    described = data.describe()
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps({**summary, "data": described}, indent=2) + "\n").encode())
    table = Table(title=f"{folder}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    table.add_column("measured on")
    measured = summary.get("val_images", described["num_val"])
    place = described["val"] or described["train"]  # of which a part is held out
    sets = {"val_": "validation images", "val_images": ""}
    sets["baseline_"] = sets["val_"]
    sets["codebook_usage"] = sets["perplexity"] = "the last steps of training"
    sets["seconds"] = "this call"
    sets["seconds_of_all_calls"] = sets["steps"] = sets["samples_seen"] = "the whole run"
    for name, value in summary.items():
        if isinstance(value, dict) or value == []:
            continue  # health by name, which summary.json and the page have; no alarms
        on = sets.get(name) or next(
            (t for k, t in sets.items() if k[-1] == "_" and name.startswith(k)), ""
        )
        table.add_row(name, written(value), on)
    say(table)
    say(f"validation images: {counted(measured, 'image')} of {place}")
    if report := data.skipped_report():
        say(f"[yellow]{report}[/yellow]")
    if commands := "\n      ".join(task.next_commands(folder)):
        say(f"pictures: {folder}/pictures\nnext: {commands}")


def written(value: Any) -> str:
    """Return a value of a summary for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare(jobs: Sequence[tuple[Path, Sequence[str], dict[str, Any]]]) -> None:
    """Print the runs of a sweep next to each other, named by what differed.

    Args:
        jobs: of each run its folder, its words and its summary.
    """
    values = [
        dict(word.lstrip("+~").split("=", 1) for word in words if "=" in word)
        for _, words, _ in jobs
    ]
    keys = sorted({key for each in values for key in each})
    differing = [key for key in keys if len({each.get(key) for each in values}) > 1]
    first = jobs[0][2]
    results = [k for k in first if k.startswith("val_") or k in ("codebook_usage", "seconds")]
    table = Table(title=f"{jobs[0][0].parent}: {counted(len(jobs), 'run')}", title_justify="left")
    table.add_column("run")
    for name in (*differing, *results):
        table.add_column(name.removeprefix("val_"), justify="right")
    for (folder, _, summary), words in zip(jobs, values, strict=True):
        row = [words.get(key, "") for key in differing]
        row += [written(summary[name]) if name in summary else "" for name in results]
        table.add_row(folder.name, *row)
    say(table)
    counts = {summary.get("val_images") for _, _, summary in jobs}
    if len(counts) == 1 and (count := counts.pop()) is not None:
        say(f"each measured on {counted(count, 'validation image')}")
