"""Health of a training: means over windows of steps, and alarms that say what to set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.core.console import say
from vistok.core.ranks import is_first_process
from vistok.core.values import Count, Share, check

if TYPE_CHECKING:
    from vistok.training.task import Task

#: Names of numbers that are worth a mean over a window.
_WATCHED = ("gan/", "weight/", "gradient/")


class Health:
    """Averages what shows whether a training is well, and raises each alarm once.

    Numbers stay on the device until a window is full, which is the one time that it waits for them.

    Args:
        options: `callbacks` of the config: `health_every`, steps of a window and from one
            measurement of the terms' gradients to the next; `winning_accuracy` and
            `winning_windows`, how accurate a discriminator is, and for how long, before that is
            an alarm.

    Attributes:
        alarms: raised so far: name to what was said.
        last: means over the last full window.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.every = options.get("health_every", 100)
        self.accuracy = options.get("winning_accuracy", 0.97)
        self.patience = options.get("winning_windows", 5)
        check("callbacks.health_every", self.every, Count)
        check("callbacks.winning_accuracy", self.accuracy, Share)
        check("callbacks.winning_windows", self.patience, Count)
        self.alarms: dict[str, str] = {}
        self.last: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0  # of the window under way
        self._winning: list[float] = []  # losses of the generator, of windows in a row

    def measures(self, step: int) -> bool:
        """Return whether gradients of the terms are measured in a step."""
        return step % self.every == 0

    def take(self, numbers: Mapping[str, Tensor], task: Task) -> None:
        """Add the numbers of a step, the same on every rank, and judge a window that is full."""
        players = {f"loss/{name}" for name in task.objective.players}
        for name, value in numbers.items():
            if name.startswith(_WATCHED) or name in players:
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1
        if self._steps >= self.every:
            self._close(task)

    def _close(self, task: Task) -> None:
        if self._sums:
            means = torch.stack([self._sums[n] / self._counts[n] for n in self._sums]).tolist()
            self.last = dict(zip(self._sums, means, strict=True))
            for name in task.objective.players:
                self._judge(name, task)
        self._sums, self._counts, self._steps = {}, {}, 0

    def _judge(self, player: str, task: Task) -> None:
        """Tell a discriminator that has won from one that is good."""
        accuracy, loss = self.last.get("gan/accuracy"), self.last.get(f"loss/{player}")
        if accuracy is None or loss is None or accuracy < self.accuracy:
            self._winning = []
            return
        self._winning.append(loss)
        if len(self._winning) > self.patience and self._winning[-1] > self._winning[0]:
            key = f"loss.terms.{player}"
            self.alarm(
                f"{player}.wins",
                f"the discriminator is right in {accuracy:.0%} of cases and the loss of "
                f"{key} has risen from {self._winning[0]:.3g} to {loss:.3g}: the tokenizer learns "
                f"nothing from it; try a lower {key}.optimizer.lr, {key}.lecam with weight 0.001, "
                f"{key}.augment, or a later {key}.start_samples",
                task.global_step + 1,
            )
        self._winning = self._winning[-(self.patience + 1) :]

    def alarm(self, name: str, text: str, step: int) -> None:
        """Say what is wrong and what to do, once; every rank must call it alike."""
        if name in self.alarms:
            return
        self.alarms[name] = f"step {step}: {text}"
        if is_first_process():
            say(f"[yellow]{self.alarms[name]}[/yellow]")

    def summary(self) -> dict[str, Any]:
        """Return what `summary.json` says."""
        return {"health": dict(self.last), "alarms": list(self.alarms.values())}

    def state_dict(self) -> dict[str, Any]:
        """Return the window under way and the alarms."""
        return {
            "alarms": dict(self.alarms),
            "last": dict(self.last),
            "sums": {name: value.clone() for name, value in self._sums.items()},
            "counts": dict(self._counts),
            "steps": self._steps,
            "winning": list(self._winning),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.alarms, self.last = dict(state["alarms"]), dict(state["last"])
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._steps, self._winning = int(state["steps"]), list(state["winning"])
