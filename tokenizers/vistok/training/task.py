"""The contract of a task, and what the training of all tasks shares.

A task says what is trained, on what data, and which number watches it; `training/run.py` trains it
without knowing which one it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.core.ranks import all_reduce_sum, average_gradients, world_size
from vistok.core.sample_random import drawing
from vistok.core.terminal import typed
from vistok.losses.entry import resolve_terms
from vistok.losses.objective import Objective
from vistok.training.data import TrainingData
from vistok.training.ema import EMA
from vistok.training.guard import ADVICE, Guard
from vistok.training.health import Health
from vistok.training.lightning_internals import begin_with_a_whole_step, set_logged_step
from vistok.training.memory import keep_freed_memory
from vistok.training.optimizers import build_optimizer, clip_by_norm, learning_rate
from vistok.training.schedule import Schedule, fresh, resumed
from vistok.training.sharding import ShardedStrategy, is_sharded, shard, whole_parameters


class Task(L.LightningModule, ABC):
    """A model, its objective, its data, and the number that watches it.

    The position in the data (`samples_seen` of the DataModule) is the one clock that schedules
    read: it survives a change of batch size or ranks, and is restored on resume.

    A subclass sets `model` and `objective` in its constructor and then calls `ready`.

    Args:
        config: the run's resolved config as plain containers. It is saved in checkpoints.

    Attributes:
        model: what is averaged, evaluated and exported.
        objective: what is minimised.
        monitor: name of the validation result by which `best.ckpt` is kept, and whether the
            largest ("max") or the smallest ("min") is best.
        results: of the last validation, by name.
    """

    model: nn.Module
    objective: Objective
    monitor: tuple[str, str]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = config
        self.schedule = config["optimizer"]
        self.ema: EMA | None = None
        self.results: dict[str, float] = {}
        self.validated_step = -1
        self.guard = Guard(config["callbacks"].get("max_skipped_steps", 20))
        self.health = Health(config["callbacks"])
        self._skip = False  # the step under way
        self._numbers: dict[str, Tensor] = {}  # of the step under way, summed over its batches
        self._first = 0  # position in the data at which it began
        self._lr_schedule: Schedule | None = None
        self._resumed_from: tuple[dict[str, Any], int, Path] | None = None
        self.schedule_note = ""  # what a resume made of the learning rate

    def ready(self) -> None:
        """Equip the players, and begin to average, once model and objective are there."""
        self.objective.equip(build_optimizer)
        decay = self.config["ema"]["decay"]
        self.ema = EMA(self.model, decay) if decay else None
        # A bound method, not a module: it must not appear in the state dict a second time.
        forward = self.model.forward
        self._step_function = torch.compile(forward) if self.config["compile"] else forward

    def settle(self, trainer: L.Trainer, data: TrainingData) -> None:
        """Settle what depends on the trainer: shares of the run become samples.

        In the config, too, so that a run that is continued for longer keeps its schedules.

        Raises:
            ConfigError: for an adaptive weight where gradients at one layer cannot be had.
        """
        entries = self.objective.entries.items()
        adaptive = [name for name, entry in entries if entry.adaptive is True]
        for key, why in (
            ("compile=true", self.config["compile"]),
            ("trainer.strategy=fsdp2", self.config["trainer"]["strategy"] == "fsdp2"),
        ):
            if adaptive and why:
                raise ConfigError(
                    f"loss.terms.{adaptive[0]}.adaptive=true: walks a part of the graph, which "
                    f"does not work with {key}; use adaptive=picture or a fixed weight"
                )
        per_step = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        total = self.schedule["total_samples"] or trainer.max_steps * per_step
        self.objective.resolve(int(total))
        resolve_terms((self.config.get("loss") or {}).get("terms") or {}, int(total))

    # ------------------------------------------------------------------ what a task says

    @classmethod
    def resolve(cls, config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
        """Return the config of a fresh run, as composed, in the form that the task trains.

        Args:
            config: resolved, as plain containers.
            words: `key=value` of the command line.
        """
        return config

    @abstractmethod
    def build_data(self) -> TrainingData:
        """Return the run's data, not set up yet."""

    @abstractmethod
    def compute(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return a batch's losses with their "total", and further numbers to log."""

    @abstractmethod
    def start_weights(self, data: TrainingData, device: torch.device) -> None:
        """Give the model the weights that a fresh run starts with."""

    @abstractmethod
    def callbacks(self, folder: Path) -> list[L.Callback]:
        """Return the task's own callbacks, which may write to the run folder."""

    @abstractmethod
    def description(self) -> str:
        """Return a line that says what is trained."""

    @abstractmethod
    def headline(self) -> str:
        """Return the results of the last validation in a few words."""

    @abstractmethod
    def summary(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return what `summary.json` says of the finished run; every rank must call it."""

    @classmethod
    @abstractmethod
    def evaluate(cls, config: dict[str, Any], data_overrides: list[str]) -> dict[str, Any]:
        """Judge a finished run, for `eval.py`; return what `metrics.json` holds.

        Args:
            config: resolved `configs/eval.yaml`.
            data_overrides: `data=...` and `data.*=...`.
        """

    def next_commands(self, folder: Path) -> list[str]:
        """Return what to type after the run in this folder."""
        return [f"{typed('eval')} run={folder}"]

    def after_step(self) -> dict[str, Tensor]:
        """Do what happens once per optimizer step, before the average moves; return numbers."""
        return {}

    def discard_step(self) -> None:
        """Forget what a step that is skipped has gathered for `after_step`."""
        return None

    # ------------------------------------------------------------------ training

    def configure_model(self) -> None:
        """With FSDP2, spread the parameters over the ranks, as they are at the start of the run."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ShardedStrategy) or is_sharded(self.model):
            return
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard(self.model, strategy.mesh, dtype)
        for term in self.objective.terms.values():
            if any(True for _ in term.parameters()):
                shard(term, strategy.mesh)
        self._step_function = self.model.__call__  # FSDP's hooks hang on the call
        if self.ema is not None:
            self.ema.reset()

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Return the loss of a batch, and note its numbers."""
        size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        if not self._numbers:  # the first batch of a step
            self._first = self.data.samples_seen
        self.objective.measuring = self.health.measures(self.global_step + 1)
        losses, numbers = self.compute(batch)
        self.objective.measuring = False
        for name, value in losses.items():
            self._add(f"loss/{name}", value)
        for name, value in {**numbers, **self.objective.notes}.items():
            self._add(name, value)
        # Consumed, not fetched: the position moves when the step has used the batch.
        self.data.advance(size * self.trainer.world_size)
        self.log("samples_seen", float(self.data.samples_seen))
        self.log("step", float(self.global_step + 1))  # the loggers' x axis: steps done
        return losses["total"]

    def on_after_backward(self) -> None:
        """Let the players learn from the batch, whose graph is gone by now."""
        share = 1 / self.trainer.accumulate_grad_batches
        context = self.trainer.precision_plugin.train_step_context()
        for name, value in self.objective.learn(share, context).items():
            self._add(name if "/" in name else f"loss/{name}", value)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Keep `log_every_n_steps` in time: Lightning's count gains one in some resumes."""
        set_logged_step(self.trainer, self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this step from the samples seen; end the reduction."""
        if is_sharded(self.model):
            average_gradients(whole_parameters(self))
        lr = learning_rate(self.schedule, self.samples_per_step) * self.lr_factor
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.log("lr", lr)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then do what happens once per step: players, the task's own, the average."""
        super().optimizer_step(*args, **kwargs)
        self.log("skipped_steps", float(self.guard.skipped))
        if self._skip:
            self._forget_step()
            return
        self.objective.step(self.lr_factor)
        self.health.take(self._log_numbers(), self)
        for name, value in self.after_step().items():
            self.log(name, value)
        if self.ema is not None:
            self.ema.update()

    def _forget_step(self) -> None:
        """Leave everything as it was before the step; go back if it was one too many."""
        self.objective.discard()
        self.discard_step()
        self._log_numbers()  # as they are: NaN
        if not self.guard.gives_up:
            return
        many, step = self.guard.in_a_row, self.global_step + 1
        strategy = self.trainer.strategy
        writer = strategy.checkpoint_io
        if hasattr(writer, "join"):
            writer.join()  # type: ignore[operator]
        sharded = strategy if isinstance(strategy, ShardedStrategy) else None
        content = self.guard.good_state(Path(self.trainer.default_root_dir), sharded)
        strategy.load_model_state_dict(content, strict=True)
        strategy.load_optimizer_state_dict(content)
        self._load_own(content)
        if self.trainer.is_global_zero:
            say(
                f"[yellow]step {step}: {many} steps in a row were not finite; back to the weights "
                f"of step {content['global_step']}, with the data that follow; {ADVICE}[/yellow]"
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Bound the norm of all gradients together; judge whether the step is finite.

        Without gradients an optimizer moves nothing and its moments stay as they are.
        """
        norm = self._clip(optimizer, gradient_clip_val, gradient_clip_algorithm)
        judged = {n: v for n, v in self._numbers.items() if n.startswith("loss/")}
        if self.trainer.precision != "16-mixed":  # whose scaler meets overflows on purpose
            judged["norm of the gradient"] = norm
        for number, player_norm in enumerate(self.objective.gather()):
            judged[f"norm of the gradient of player {number}"] = player_norm
        self._skip = self.guard.judge(judged, self.global_step + 1)
        if self._skip:
            optimizer.zero_grad(set_to_none=True)
        else:
            self.log("gradient/whole", norm)

    def _clip(
        self, optimizer: torch.optim.Optimizer, largest: float | None, algorithm: str | None
    ) -> Tensor:
        """Bound the gradients; return their norm before, or after if single values are bounded."""
        if is_sharded(self.model):
            return clip_by_norm(self.parameters(), largest or math.inf)
        if largest and algorithm == "value":
            super().configure_gradient_clipping(optimizer, largest, algorithm)
            largest = None
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if largest:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(own, largest, norm)
        return norm

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what is trainable."""
        s = self.schedule
        trained = nn.ModuleList([self.model, self.objective])
        return build_optimizer(trained, s["lr"], s["betas"], s["weight_decay"])

    @property
    def data(self) -> TrainingData:
        """The DataModule, which owns the position in the data."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def step_began_at(self) -> int:
        """Position in the data at which the step under way began."""
        return self._first

    @property
    def lr_factor(self) -> float:
        """Warm-up and decay at the end of the step under way."""
        return self.lr_schedule.factor(self.data.samples_seen)

    @property
    def lr_schedule(self) -> Schedule:
        """Warm-up and decay, by the samples seen; a resumed run's go on as `on_extend` says."""
        if self._lr_schedule is None:
            end = self.trainer.max_steps * self.samples_per_step
            if self._resumed_from is None:
                self._lr_schedule = fresh(self.schedule, end)
            else:
                now = resumed(self.schedule, end, *self._resumed_from)
                self._lr_schedule, self.schedule_note = now
        return self._lr_schedule

    def plan_schedule(self, checkpoint: dict[str, Any], samples: int, source: Path) -> None:
        """Let the learning rate go on from a checkpoint, whose weights are not needed here."""
        kept = ("hyper_parameters", "global_step", "schedule")
        content = {key: checkpoint[key] for key in kept if key in checkpoint}
        self._resumed_from = content, samples, source

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step over all ranks and accumulated batches."""
        per_rank = self.data.batch_size * self.trainer.accumulate_grad_batches
        return per_rank * self.trainer.world_size

    def drawing(self, size: int) -> AbstractContextManager[None]:
        """Return a context in which random numbers are those of the samples' positions.

        Args:
            size: of the batch, on this rank.
        """
        first = self.data.samples_seen + self.global_rank * size
        positions = torch.arange(first, first + size, device=self.device)
        return drawing(self.config["seed"], positions, self._first)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._numbers[name] = self._numbers[name] + value if name in self._numbers else value

    def _log_numbers(self) -> dict[str, Tensor]:
        """Log the step's numbers: means over its batches and over the ranks, in one reduction."""
        if not self._numbers:
            return {}
        share = 1 / (self.trainer.accumulate_grad_batches * world_size())
        means = all_reduce_sum(torch.stack(list(self._numbers.values()))) * share
        for name, value in zip(self._numbers, means, strict=True):
            self.log(name, value, prog_bar=name == "loss/total")
        logged, self._numbers = dict(zip(self._numbers, means, strict=True)), {}
        return logged

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights, the players, the schedule, and the counts of the watches."""
        checkpoint["schedule"] = self.lr_schedule.state()
        checkpoint["guard"] = self.guard.state_dict()
        checkpoint["health"] = self.health.state_dict()
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()
        if self.objective.players:
            checkpoint["players"] = self.objective.players_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back, and begin with a whole step."""
        self._load_own(checkpoint)
        if checkpoint.get("guard"):  # not of older runs
            self.guard.load_state_dict(checkpoint["guard"])
            self.health.load_state_dict(checkpoint["health"])
        begin_with_a_whole_step(checkpoint, self.trainer.accumulate_grad_batches)

    def _load_own(self, checkpoint: dict[str, Any]) -> None:
        """Take back the averaged weights and the players."""
        if self.ema is not None and checkpoint.get("ema"):
            self.ema.load_state_dict(checkpoint["ema"])
        elif self.ema is not None:  # begun without: the weights, not the random ones of before
            self.ema.reset()
        self.objective.load_players_state(checkpoint.get("players") or {})

    def on_fit_start(self) -> None:
        """Bring what is not a submodule to where the model is; keep memory between steps."""
        self.objective.players_to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
