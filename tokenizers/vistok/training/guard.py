"""Steps that are not finite: skipped, and after too many in a row undone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from vistok.checkpoints.read import read_checkpoint
from vistok.checkpoints.resume import newest_first
from vistok.core.console import say
from vistok.core.errors import CheckpointError, VistokError
from vistok.core.ranks import all_reduce_sum, is_first_process
from vistok.core.values import Count, check

#: What to do about numbers that are not finite, for messages.
ADVICE = "lower optimizer.lr, or set trainer.precision=32"


class Guard:
    """Finds steps whose losses or gradients are not finite, on any rank.

    Such a step moves nothing: neither weights, moments, averages and codes nor a player. The data
    go on, and the step counts as one. After `most_in_a_row` of them the run returns to its last
    checkpoint of before, with the data where they are: the same batches would do the same again.
    To each checkpoint it returns once, so that a further return goes further back or ends the run.

    Args:
        most_in_a_row: how many are skipped one after another.

    Attributes:
        skipped: steps skipped so far.
        in_a_row: up to the last step.
        returns: how often the run went back.
        proven: whether the last step was finite, so that the state is worth keeping.
    """

    def __init__(self, most_in_a_row: int) -> None:
        check("callbacks.max_skipped_steps", most_in_a_row, Count)
        self.most_in_a_row = most_in_a_row
        self.skipped = self.in_a_row = self.returns = 0
        self.proven = True
        self.tried: list[int] = []  # steps of the checkpoints gone back to

    def judge(self, numbers: Mapping[str, Tensor], step: int) -> bool:
        """Return whether a step is to be skipped; every rank must call it, and hears the same.

        The one wait for the accelerator in a step: whether to move must be known before moving.

        Args:
            numbers: losses summed over the batches of this rank, and norms of gradients.
            step: under way, for the message.
        """
        stacked = torch.stack([value.detach().float() for value in numbers.values()])
        bad = all_reduce_sum((~torch.isfinite(stacked)).sum())
        self.proven = not int(bad)
        if self.proven:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if is_first_process() and self.in_a_row == 1:
            values = dict(zip(numbers, stacked.tolist(), strict=True))
            found = [f"{n} is {v}" for n, v in values.items() if not math.isfinite(v)]
            where = found[0] if found else "a loss or gradient on another rank is not finite"
            say(f"[yellow]step {step}: {where}; the step is skipped[/yellow]")
        return True

    @property
    def gives_up(self) -> bool:
        """Return whether so many were skipped in a row that the state itself must be bad."""
        return self.in_a_row >= self.most_in_a_row

    def good_state(self, folder: Path, strategy: Strategy | None) -> dict[str, Any]:
        """Return the content of the checkpoint to go back to, and count the return.

        Args:
            folder: of the run; its checkpoints are all written.
            strategy: that reads sharded ones; None if they are not.

        Raises:
            VistokError: if there is none.
        """
        for path in newest_first(folder):
            try:
                content = strategy.load_checkpoint(path) if strategy else read_checkpoint(path)
            except (CheckpointError, OSError):
                continue
            step = int(content["global_step"])
            if step not in self.tried and (content.get("guard") or {}).get("proven", True):
                self.tried.append(step)
                self.returns += 1
                self.in_a_row = 0
                return content
        raise VistokError(
            f"{self.in_a_row} steps in a row were not finite, and there is no earlier checkpoint "
            f"to return to; {ADVICE}"
        )

    def summary(self) -> dict[str, int]:
        """Return what `summary.json` says."""
        return {"skipped_steps": self.skipped, "returns": self.returns}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        names = ("skipped", "in_a_row", "returns", "proven", "tried")
        return {name: copy.copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name in self.state_dict():
            setattr(self, name, copy.copy(state[name]))
