"""The LightningModule: thin over tokenizer, losses, EMA and schedule, and one for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vistok.core.errors import ConfigError, VistokError
from vistok.core.ranks import all_reduce_sum, average_gradients, world_size
from vistok.core.sample_random import drawing
from vistok.data.datamodule import VistokDataModule
from vistok.evaluation.evaluator import Evaluator
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.models.tokenizer import Tokenizer
from vistok.tasks.stages import prepare_stage
from vistok.training.ema import EMA
from vistok.training.lightning_internals import begin_with_a_whole_step, set_logged_step
from vistok.training.memory import keep_freed_memory
from vistok.training.optimizers import build_optimizer, clip_by_norm, learning_rate, warmup_cosine
from vistok.training.sharding import ShardedStrategy, is_sharded, release, shard, whole_parameters


class TokenizerModule(L.LightningModule):
    """Trains any tokenizer.

    The position in the data (`samples_seen` of the DataModule) is the one clock that schedules
    read: it survives a change of batch size or ranks, and is restored on resume.

    Args:
        config: the run's resolved config as plain containers. It is saved in checkpoints.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = config
        self.tokenizer = build_tokenizer(config)
        prepare_stage(self.tokenizer, config)
        check_fields(self.tokenizer, config["data"].get("fields") or ())
        self.objective = build_objective(config["loss"], self.tokenizer)
        self.objective.equip(build_optimizer)
        self.schedule = config["optimizer"]
        decay = config["ema"]["decay"]
        self.ema = EMA(self.tokenizer, decay) if decay else None
        self.evaluator: Evaluator | None = None
        self.val_results: dict[str, float] = {}
        self.val_step = -1
        self._numbers: dict[str, Tensor] = {}  # of the step under way, summed over its batches
        self._first = 0  # position in the data at which it began
        # A bound method, not a module: it must not appear in the state dict a second time.
        forward = self.tokenizer.forward
        self._step_function = torch.compile(forward) if config["compile"] else forward

    def configure_model(self) -> None:
        """With FSDP2, spread the parameters over the ranks, as they are at the start of the run."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ShardedStrategy) or is_sharded(self.tokenizer):
            return
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard(self.tokenizer, strategy.mesh, dtype)
        for term in self.objective.terms.values():
            if any(True for _ in term.parameters()):
                shard(term, strategy.mesh)
        self._step_function = self.tokenizer.__call__  # FSDP's hooks hang on the call
        if self.ema is not None:
            self.ema.reset()

    # ------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of a batch of uint8 images, normalised on the device."""
        images = batch["image"].float().div_(127.5).sub_(1)
        with self._drawing(images):
            conditions = self.tokenizer.conditions_of(batch)
            output = self._step_function(images, self.objective.taps, **conditions)
        losses = self.objective(Step(images, output, self.tokenizer, self._first))
        self._check_finite(losses)
        for name, value in losses.items():
            self._add(f"loss/{name}", value)
        for name, value in output.quantizer.metrics.items():
            self._add(f"quantizer/{name}", value)
        # Consumed, not fetched: the position moves when the step has used the batch.
        self.data.advance(len(images) * self.trainer.world_size)
        self.log("samples_seen", float(self.data.samples_seen))
        self.log("step", float(self.global_step + 1))  # the loggers' x axis: steps done
        return losses["total"]

    def on_after_backward(self) -> None:
        """Let the players learn from the batch, whose graph is gone by now."""
        share = 1 / self.trainer.accumulate_grad_batches
        context = self.trainer.precision_plugin.train_step_context()
        for name, value in self.objective.learn(share, context).items():
            self._add(f"loss/{name}", value)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Keep `log_every_n_steps` in time: Lightning's count gains one in some resumes."""
        set_logged_step(self.trainer, self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this step from the samples seen; end the reduction."""
        if is_sharded(self.tokenizer):
            average_gradients(whole_parameters(self))
        lr = learning_rate(self.schedule, self.samples_per_step) * self.lr_factor
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.log("lr", lr)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then whatever happens once per step: codebook statistics and the EMA."""
        super().optimizer_step(*args, **kwargs)
        self.objective.step(self.lr_factor)
        self._log_numbers()
        if "quantizer" not in self.tokenizer.frozen:
            optimizer = self.trainer.optimizers[0]
            for name, value in self.tokenizer.quantizer.after_step([optimizer]).items():
                self.log(f"quantizer/{name}", value)
        if self.ema is not None:
            self.ema.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Bound the norm of all gradients together."""
        if not is_sharded(self.tokenizer):
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            clip_by_norm(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what is trainable."""
        s = self.schedule
        trained = torch.nn.ModuleList([self.tokenizer, self.objective])
        return build_optimizer(trained, s["lr"], s["betas"], s["weight_decay"])

    @property
    def data(self) -> VistokDataModule:
        """The DataModule, which owns the position in the data."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def lr_factor(self) -> float:
        """Warm-up and decay at the end of the step under way."""
        return warmup_cosine(
            self.data.samples_seen,
            int(self.schedule["warmup_samples"]),
            self.total_samples,
            self.schedule["final_lr_factor"],
        )

    @property
    def total_samples(self) -> int:
        """Samples at which the schedule ends: the config's, else those of `max_steps`."""
        if self.schedule["total_samples"]:
            return int(self.schedule["total_samples"])
        return self.trainer.max_steps * self.samples_per_step

    @property
    def samples_per_step(self) -> int:
        """Images of one optimizer step over all ranks and accumulated batches."""
        per_rank = self.data.batch_size * self.trainer.accumulate_grad_batches
        return per_rank * self.trainer.world_size

    def _drawing(self, images: Tensor) -> AbstractContextManager[None]:
        """Where random numbers are those of the images' positions in the data."""
        if not self._numbers:  # the first batch of a step
            self._first = self.data.samples_seen
        first = self.data.samples_seen + self.global_rank * len(images)
        positions = torch.arange(first, first + len(images), device=images.device)
        return drawing(self.config["seed"], positions, self._first)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._numbers[name] = self._numbers[name] + value if name in self._numbers else value

    def _log_numbers(self) -> None:
        """Log the step's losses: means over its batches and over the ranks, in one reduction."""
        if not self._numbers:
            return
        share = 1 / (self.trainer.accumulate_grad_batches * world_size())
        means = all_reduce_sum(torch.stack(list(self._numbers.values()))) * share
        for name, value in zip(self._numbers, means, strict=True):
            self.log(name, value, prog_bar=name == "loss/total")
        self._numbers = {}

    def _check_finite(self, losses: dict[str, Tensor]) -> None:
        if not torch.isfinite(losses["total"]):
            bad = [name for name, value in losses.items() if not torch.isfinite(value)]
            raise VistokError(
                f"loss/{bad[0]} is {losses[bad[0]].item()} at step {self.global_step}; "
                "lower optimizer.lr, or set trainer.precision=32"
            )

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        """Begin to measure."""
        self.evaluator = Evaluator(self.tokenizer)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Measure the averaged weights on a batch."""
        assert self.evaluator is not None
        with self.averaged():
            conditions = self.tokenizer.conditions_of(batch)
            self.evaluator.update(batch["image"], batch["valid"], conditions)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the tokenizer computes with its averaged weights, if it has any."""
        with nullcontext() if self.ema is None else self.ema.averaged():
            try:
                yield
            finally:
                release(self.tokenizer)

    def on_validation_epoch_end(self) -> None:
        """Log the results as `val/...`."""
        assert self.evaluator is not None
        self.val_results = self.evaluator.compute()
        self.val_step = self.global_step
        self.log("step", float(self.global_step))
        for name in ("psnr", "ssim", "codebook_usage", "perplexity"):
            self.log(f"val/{name}", self.val_results[name], batch_size=1)
        self.evaluator = None

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights and the players."""
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()
        if self.objective.players:
            checkpoint["players"] = self.objective.players_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back, and begin with a whole step."""
        if self.ema is not None and checkpoint.get("ema"):
            self.ema.load_state_dict(checkpoint["ema"])
        self.objective.load_players_state(checkpoint.get("players") or {})
        begin_with_a_whole_step(checkpoint, self.trainer.accumulate_grad_batches)

    def on_fit_start(self) -> None:
        """Bring what is no submodule to where the tokenizer is; keep memory between steps."""
        self.objective.players_to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()


def check_fields(tokenizer: Tokenizer, fields: Sequence[str]) -> None:
    """Refuse to train without what the decoder reads besides tokens.

    Raises:
        ConfigError: naming the field that is missing.
    """
    for name in tokenizer.decoder.conditions:
        if name not in fields:
            raise ConfigError(
                f"data.fields: must hold {name}, which {type(tokenizer.decoder).__name__} reads; "
                f"with data.fields=[{name}] it is the member .{name}.npy of each sample"
            )
