"""The Lightning Trainer of a config: devices, precision, batches and loggers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from vistok.core.errors import ConfigError, nearest
from vistok.core.terminal import counted
from vistok.core.torch_internals import cpu_has_bf16_units
from vistok.training.callbacks import (
    DataWatch,
    RandomState,
    ValidationLine,
)
from vistok.training.checkpointing import Checkpoints
from vistok.training.data import TrainingData
from vistok.training.ema import AveragedWeights
from vistok.training.lightning_internals import leave_signals_alone
from vistok.training.metrics_file import MetricsFile
from vistok.training.progress import ProgressBar
from vistok.training.sharding import ShardedStrategy
from vistok.training.stopping import StopAfterStep
from vistok.training.wandb_logger import build_wandb

PRECISIONS = {
    "bf16": "bf16-mixed",
    "16": "16-mixed",
    "32": "32-true",
    "bf16-mixed": "bf16-mixed",
    "16-mixed": "16-mixed",
    "32-true": "32-true",
}

#: Of products of float32 matrices, in torch's words.
MATMUL_PRECISIONS = ("highest", "high", "medium")


def build_trainer(
    config: dict[str, Any],
    folder: Path,
    first_step: int,
    stop: StopAfterStep,
    checkpoints: Checkpoints,
    own: list[L.Callback],
) -> L.Trainer:
    """Return the Lightning Trainer of a config.

    Args:
        config: of the run.
        folder: of the run.
        first_step: step at which it goes on; 0 for a fresh run.
        stop: ends the run early.
        checkpoints: keeps the last and the best.
        own: callbacks of the task.
    """
    options = dict(config["trainer"])
    accelerator = str(options.pop("accelerator"))
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator}: no usable GPU was found; use cpu or auto"
        )
    options["precision"] = precision(options["precision"], accelerator)
    devices, nodes = options.get("devices", 1), options.get("num_nodes", 1)
    strategy: Any = options.pop("strategy")
    timeout = timedelta(seconds=options.pop("timeout", 600))
    show_bar = options.pop("enable_progress_bar")
    options.pop("global_batch_size", None)  # see `set_batches`
    options.pop("matmul_precision", None)  # see `float32_products`
    many = nodes > 1 or devices not in (1, "1", "auto", [0])
    if devices == "auto":
        many = many or (accelerator != "cpu" and torch.cuda.device_count() > 1)
    if strategy in ("ddp", "ddp_unused") or (strategy == "auto" and many):
        # Codebook statistics are all-reduced by the quantizers; broadcasting rank 0's buffers
        # before every forward would cost time and hide a mistake. Lightning takes NCCL for GPUs
        # and gloo for CPUs.
        strategy = DDPStrategy(
            broadcast_buffers=False,
            find_unused_parameters=strategy == "ddp_unused",
            timeout=timeout,
        )
    elif strategy == "fsdp2":
        if options["precision"] == "16-mixed":
            raise ConfigError("trainer.precision=16: trainer.strategy=fsdp2 takes bf16 or 32")
        if torch.__version__ < "2.15":  # TorchVersion compares numbers
            raise ConfigError(
                f"trainer.strategy=fsdp2: needs torch 2.15, with which it is tested; found "
                f"{torch.__version__}"
            )
        if config["compile"]:
            raise ConfigError("compile=true: cannot be combined with trainer.strategy=fsdp2")
        strategy = ShardedStrategy(timeout)
    known = set(inspect.signature(L.Trainer).parameters)
    for name in options:
        if name not in known:
            raise ConfigError(f"trainer.{name}: no such key{nearest(name, known)}")
    trainer = _trainer(
        accelerator=accelerator,
        strategy=strategy,
        **options,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=build_loggers(config, folder, first_step),
        plugins=[checkpoints.writer],
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[
            RandomState(),
            *own,
            DataWatch(folder / "skipped.tsv"),
            AveragedWeights(),
            ValidationLine(),
            DataWatch(folder / "skipped.tsv"),  # behind what draws after a validation
            *([ProgressBar()] if show_bar else []),
            stop,
            checkpoints,
        ],
    )
    leave_signals_alone(trainer)  # `StopAfterStep` does that, scripts/slurm.sh the requeueing
    return trainer


def _trainer(**options: Any) -> L.Trainer:
    """Build a Trainer; what it refuses is said in one line."""
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:240]
        raise ConfigError(f"trainer: Lightning refuses it: {said}") from error


def in_words(trainer: L.Trainer, batch_size: int) -> str:
    """Describe the training, such as `880 steps of 32 images on 1 CPU process in bf16`."""
    ranks, batches = trainer.world_size, trainer.accumulate_grad_batches
    kind = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    devices = counted(ranks, {"CPU": "CPU process", "CUDA": "GPU"}.get(kind, f"{kind} device"))
    images = counted(batch_size * ranks * batches, "image")
    if batches > 1:
        images += f" in {counted(ranks * batches, 'batch')}"
    names = {"32-true": "float32", "bf16-mixed": "bf16", "16-mixed": "float16"}
    number = names.get(str(trainer.precision), str(trainer.precision))
    return f"{counted(trainer.max_steps, 'step')} of {images} on {devices} in {number}"


def set_batches(config: dict[str, Any], data: TrainingData, trainer: L.Trainer) -> None:
    """Derive batch per device and accumulation from `trainer.global_batch_size`, if it is given.

    Raises:
        ConfigError: if it does not divide.
    """
    options = config["trainer"]
    accumulate = options["accumulate_grad_batches"]
    if wanted := options.get("global_batch_size"):
        if accumulate != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulate}: follows from "
                f"trainer.global_batch_size={wanted}; give one of the two"
            )
        data.batch_size, accumulate = split_batch(wanted, trainer.world_size, data.batch_size)
        trainer.accumulate_grad_batches = accumulate
    data.batches_per_step = accumulate
    if isinstance(share := trainer.limit_val_batches, float):  # Lightning would round down to none
        trainer.limit_val_batches = max(1, int(len(data.val_dataloader()) * share))
    if isinstance(trainer.val_check_interval, int):  # ours counts steps, Lightning's batches
        trainer.val_check_interval *= accumulate


def split_batch(total: int, ranks: int, largest: int) -> tuple[int, int]:
    """Split `total` images into a batch per device, of at most `largest`, and batches per step.

    Raises:
        ConfigError: if it does not divide.
    """
    share, rest = divmod(total, ranks)
    if rest:
        raise ConfigError(
            f"trainer.global_batch_size={total}: cannot be divided among {ranks} devices; use "
            f"{max(1, share) * ranks} or {(share + 1) * ranks}"
        )
    batches = -(-share // largest)
    if share % batches:
        raise ConfigError(
            f"trainer.global_batch_size={total}: {share} images per device cannot be divided "
            f"into {batches} equal batches of at most data.batch_size={largest}; use "
            f"{ranks * batches * largest}"
        )
    return share // batches, batches


def precision(name: Any, accelerator: str) -> str:
    """Return Lightning's name of a precision; `auto` is bf16 where the hardware computes in it."""
    name = str(name)
    if name != "auto":
        if name not in PRECISIONS:
            known = ["auto", "bf16", "16", "32"]
            raise ConfigError(
                f"trainer.precision={name}: must be one of {', '.join(known)}{nearest(name, known)}"
            )
        if PRECISIONS[name] == "16-mixed" and (
            accelerator == "cpu" or not torch.cuda.is_available()
        ):
            raise ConfigError(f"trainer.precision={name}: needs a GPU; use bf16, 32 or auto")
        return PRECISIONS[name]
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if cpu_has_bf16_units() else "32-true"


@contextmanager
def float32_products(name: Any) -> Iterator[None]:
    """Multiply float32 matrices in this precision within the context.

    Raises:
        ConfigError: if torch has no such precision.
    """
    if name not in MATMUL_PRECISIONS:
        raise ConfigError(
            f"trainer.matmul_precision={name}: must be one of {', '.join(MATMUL_PRECISIONS)}"
            f"{nearest(str(name), MATMUL_PRECISIONS)}"
        )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def build_loggers(config: dict[str, Any], folder: Path, first_step: int) -> list[Logger]:
    """Build the logger of `metrics.jsonl`, and that of wandb or TensorBoard if chosen."""
    loggers: list[Logger] = [MetricsFile(folder, first_step)]
    kind = config["logger"]["name"]
    if kind == "tensorboard":
        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    elif kind == "wandb" and (run := build_wandb(config, folder)):
        loggers.append(run)
    return loggers
