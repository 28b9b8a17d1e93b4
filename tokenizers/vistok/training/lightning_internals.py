"""Every private name of Lightning that vistok uses, as small functions, in one place.

Lightning may rename any of them in a new version: pyproject.toml bounds the versions, and
tests/test_internals.py fails when a name is gone or does something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals, which `training/stopping.py` does.

    Its handlers of SIGTERM (and of SIGUSR1 under SLURM) run collectives and save inside the
    handler, which hangs if another collective is under way; and each batch pays a broadcast and a
    wait for the GPU. There is no option for SIGTERM.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def watch_children_by(start: Callable[[Any], None]) -> None:
    """Replace Lightning's watch over the ranks that it starts, which kills without a word.

    Args:
        start: is given the processes as soon as they are started.
    """
    assert hasattr(subprocess_script, "_launch_process_observer"), "it has another name now"
    setattr(subprocess_script, "_launch_process_observer", start)  # noqa: B010


def children_of(trainer: L.Trainer) -> list[Any]:
    """Return the processes that Lightning started as ranks 1, 2, ...; none if it started none."""
    return list(getattr(trainer.strategy.launcher, "procs", ()))


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Say which step is under way to Lightning's count for `log_every_n_steps`.

    The count is its own, and gains one in some resumes.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def row_to_log(trainer: L.Trainer) -> dict[str, float]:
    """Return what Lightning is about to hand to the loggers after this step; {} if nothing.

    It does so behind the callbacks, one of which saves: a checkpoint would be there before the row
    of its step.
    """
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return {}
    return {name: float(value) for name, value in connector.metrics["log"].items()}


def begin_with_a_whole_step(checkpoint: dict[str, Any], batches_per_step: int) -> None:
    """Let a resumed run begin with the first batch of a step, and of an epoch of Lightning's.

    Lightning counts batches: those of its epoch, at whose end it steps with what it has, and all of
    them, by which it validates. Checkpoints lie between steps, so steps are what counts; a resume
    may also change how many batches a step accumulates.

    Args:
        checkpoint: as Lightning has read it; changed in place.
        batches_per_step: of the run that goes on.
    """
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = checkpoint["global_step"] * batches_per_step
    for name, ready in (("current", 0), ("total", done)):
        shift = ready - batches[name]["ready"]
        batches[name] = {key: count + shift for key, count in batches[name].items()}
    batches["is_last_batch"] = False


def spread_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Let a strategy that knows its devices, but is not set up, make one mesh of all ranks.

    Its arguments are wanted before the number of devices is known, and "auto" takes the ranks of a
    node for tensor parallelism.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1
