"""Find the checkpoint that a run resumes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vistok.checkpoints.migrate import migrate_config
from vistok.checkpoints.seals import check_seal, seal_of
from vistok.core.configuration import load_run_config, to_container
from vistok.core.console import say
from vistok.core.errors import CheckpointError
from vistok.core.files import read_json
from vistok.core.run_folders import leads
from vistok.core.values import is_whole


def stored_config(run: Path) -> dict[str, Any]:
    """Return the config that a run folder keeps, in today's form.

    Raises:
        CheckpointError: if there is no such run, or a newer vistok wrote it.
    """
    return migrate_config(to_container(load_run_config(run)), run / "config.yaml")


def newest_whole(run: Path) -> Path | None:
    """Return the newest intact checkpoint of a run folder; None if there is no file at all.

    Damaged ones are passed over, with one line for each.

    Raises:
        CheckpointError: if there are checkpoints and none is whole.
    """
    problems = []
    for path in newest_first(run):
        try:
            check_seal(path)
            return path
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            if leads():
                say(f"[yellow]{error}; trying an older one[/yellow]")
    if problems:
        raise CheckpointError(f"{run}: no checkpoint is intact; {problems[0]}")
    return None


def newest_first(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, intact or not, the newest first."""
    return sorted((run / "checkpoints").glob("*.ckpt"), key=_age, reverse=True)


def _age(path: Path) -> tuple[float, str]:
    """Return a sort key: `last.ckpt` is the newest, the others go by their step."""
    if path.name == "last.ckpt":
        return float("inf"), ""
    if number := re.fullmatch(r"step_(\d+)", path.stem):
        return float(number[1]), path.name
    sealed = seal_of(path)
    return (-1.0 if sealed is None else sealed[1]), path.name


def finished_steps(folder: Path) -> int:
    """Return the steps of the run whose summary the folder holds; 0 without one."""
    steps = read_json(folder / "summary.json").get("steps")
    return steps if is_whole(steps) and steps >= 0 else 0
