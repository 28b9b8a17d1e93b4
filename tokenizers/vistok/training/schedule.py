"""The schedule of the learning rate, and what becomes of it when a run gets more steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vistok.core.errors import CheckpointError
from vistok.core.terminal import counted
from vistok.core.values import is_number, is_whole
from vistok.training.optimizers import warmup_cosine

#: Share of the added samples over which `rewarm` rises, where the run has no warm-up of its own.
_REWARM = 0.02


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate by samples seen: linear warm-up, then a cosine.

    Attributes:
        begin: samples seen at which it begins; 0, or where a resumed run was warmed up again.
        low: factor at which the warm-up begins.
        warmup: samples of warm-up.
        total: samples seen at which the cosine has come down.
        final: factor from there on.
    """

    begin: int
    low: float
    warmup: int
    total: int
    final: float

    def factor(self, samples: int) -> float:
        """Return the factor of a step that ends after so many samples."""
        done, total = samples - self.begin, self.total - self.begin
        if done < self.warmup:
            return self.low + (1 - self.low) * done / self.warmup
        return warmup_cosine(done, self.warmup, total, self.final)

    def state(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def fresh(options: Mapping[str, Any], end: int) -> Schedule:
    """Return the schedule of a run from its start.

    Args:
        options: `optimizer` of the config.
        end: samples of the whole run.
    """
    total = int(options["total_samples"] or end)
    return Schedule(0, 0.0, int(options["warmup_samples"]), total, options["final_lr_factor"])


def resumed(
    options: Mapping[str, Any],
    end: int,
    checkpoint: Mapping[str, Any],
    samples: int,
    source: Any,
) -> tuple[Schedule, str]:
    """Return the schedule with which a run goes on, and a line about it if it is told.

    Args:
        options: `optimizer` of the config of now.
        end: samples of the whole run, as it is planned now.
        checkpoint: its content.
        samples: seen so far.
        source: file of the checkpoint, for errors.

    Raises:
        CheckpointError: if the checkpoint's schedule is damaged.
    """
    then = checkpoint["hyper_parameters"]["config"]
    before = _stored(checkpoint, samples, source)
    old_options = then["optimizer"]
    changed = [
        k
        for k in ("total_samples", "warmup_samples", "final_lr_factor")
        if options[k] != old_options.get(k)
    ]
    if changed:
        now = fresh(options, end)
        return now, f"learning rate: by the new optimizer.{changed[0]}; {_in_words(now, end)}"
    steps = max(1, int(checkpoint["global_step"]))
    old_end = int(then["trainer"]["max_steps"]) * samples // steps
    if end <= old_end or old_end < 1:
        return before, ""
    choice = options.get("on_extend", "hold")
    if choice == "stretch":
        now = Schedule(0, 0.0, before.warmup, round(before.total * end / old_end), before.final)
    elif choice == "rewarm":
        rise = before.warmup or max(1, int(_REWARM * (end - samples)))
        rise = min(rise, max(1, (end - samples) // 2))
        now = Schedule(samples, before.factor(samples), rise, end, before.final)
    else:
        now = before
    others = [word for word in ("hold", "stretch", "rewarm") if word != choice]
    return now, (
        f"learning rate: the run gets more steps, optimizer.on_extend={choice}: "
        f"{_in_words(now, end)} (or {', '.join(others)})"
    )


def _in_words(schedule: Schedule, end: int) -> str:
    parts = []
    if schedule.begin:
        parts.append(f"it rises again over {counted(schedule.warmup, 'sample')}")
    parts.append(f"the cosine ends at {counted(schedule.total, 'sample')}")
    if schedule.total < end:
        parts.append(
            f"then it stays at {schedule.final:g} of optimizer.lr until the run ends at {end}"
        )
    elif schedule.total > end:
        parts.append(
            f"the run ends before, at {end}, at {schedule.factor(end):.3g} of optimizer.lr"
        )
    return ", ".join(parts)


def _stored(checkpoint: Mapping[str, Any], samples: int, source: Any) -> Schedule:
    """Return the schedule of a checkpoint; of older ones, that of their config."""
    then = checkpoint["hyper_parameters"]["config"]
    state = checkpoint.get("schedule")
    if state is None:
        steps = max(1, int(checkpoint["global_step"]))
        return fresh(then["optimizer"], int(then["trainer"]["max_steps"]) * samples // steps)
    wholes = ("begin", "warmup", "total")
    right = (
        isinstance(state, dict)
        and set(state) == {*wholes, "low", "final"}
        and all(is_whole(state[key]) and state[key] >= 0 for key in wholes)
        and all(is_number(state[key]) and 0 <= state[key] <= 1 for key in ("low", "final"))
    )
    if not right:
        raise CheckpointError(f"{source}: damaged; its schedule is not one")
    return Schedule(**state)
