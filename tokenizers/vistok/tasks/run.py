"""One training run: from a config to a run folder."""

from __future__ import annotations

import json
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

import vistok
from vistok.checkpoints.find import find_checkpoint_or_export
from vistok.checkpoints.load import load, load_weights
from vistok.checkpoints.migrate import in_todays_form
from vistok.checkpoints.read import read_checkpoint
from vistok.checkpoints.resume import finished_steps
from vistok.core import ranks as distributed
from vistok.core.console import say
from vistok.core.errors import ConfigError, Preempted, VistokError
from vistok.core.files import replacing
from vistok.data.datamodule import VistokDataModule
from vistok.evaluation.baseline import baseline_options, kmeans_baseline
from vistok.tasks.reconstruction import TokenizerModule
from vistok.tasks.stages import resolve_stage
from vistok.training.callbacks import CodebookWatch
from vistok.training.checkpointing import Checkpoints, CheckpointWriter
from vistok.training.optimizers import learning_rate
from vistok.training.sharding import ShardWriter
from vistok.training.stopping import INTERRUPT, PREEMPTION_SIGNALS, StopAfterStep
from vistok.training.trainer import build_trainer, float32_products, set_batches


def train(
    config: dict[str, Any],
    folder: Path,
    resume: Path | None = None,
    words: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Train a tokenizer.

    Args:
        config: resolved, as plain containers.
        folder: the run folder to write to.
        resume: checkpoint file to continue from.
        words: `key=value` that the config was composed with; None if it is that of `resume`.

    Returns:
        What `summary.json` holds.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended the run.
        Preempted: if a signal of the scheduler did.
    """
    stop = StopAfterStep()
    products = float32_products(config["trainer"].get("matmul_precision", "highest"))
    # A scheduler may ask at any time, and again while the last checkpoint is being written.
    with products, stop.listening(*PREEMPTION_SIGNALS):
        return _train(config, folder, resume, words, stop)


def _train(
    config: dict[str, Any],
    folder: Path,
    resume: Path | None,
    words: Sequence[str] | None,
    stop: StopAfterStep,
) -> dict[str, Any]:
    started = time.time()
    quiet_libraries()
    config = in_todays_form(config)
    if resume is None or words is not None:
        config = resolve_stage(config, words or ())
    L.seed_everything(config["seed"], verbose=False)
    data = VistokDataModule(**config["data"])
    module = TokenizerModule(config)  # before the data: a wrong size shows at once
    if config["init_from"]:
        find_checkpoint_or_export(config["init_from"])  # as soon as possible too
    data.prepare_data()
    data.setup("fit")
    first_step = 0
    sharded = config["trainer"]["strategy"] == "fsdp2"
    if resume is not None:
        if resume.is_dir() != sharded:
            said = "" if resume.is_dir() else "not "
            raise ConfigError(
                f"trainer.strategy={config['trainer']['strategy']}: {resume} was {said}written with"
                " fsdp2; keep the strategy of the run, or start a new one with init_from"
            )
        content = read_checkpoint(resume, without=["optimizer_states", "ema"])
        first_step = int(content["global_step"])
        check_same_architecture(module, content, resume)
        # Without a summary the run was killed after its last step, and is yet to be finished.
        if config["trainer"]["max_steps"] <= min(first_step, finished_steps(folder)):
            raise ConfigError(
                f"trainer.max_steps={config['trainer']['max_steps']}: {resume} is already at step "
                f"{first_step}; pass a larger trainer.max_steps to go on"
            )
        del content
    callbacks = config["callbacks"]
    writer = (ShardWriter if sharded else CheckpointWriter)(
        callbacks.get("keep_last", 2), callbacks.get("background_checkpoints", True)
    )
    checkpoints = Checkpoints(folder / "checkpoints", callbacks["checkpoint_every"], writer)
    trainer = build_trainer(config, folder, first_step, stop, checkpoints)
    if module.objective.players and trainer.precision == "16-mixed":
        names = ", ".join(module.objective.players)
        raise ConfigError(f"trainer.precision=16: loss.terms.{names} takes bf16 or 32")
    set_batches(config, data, trainer)
    learning_rate(config["optimizer"], 1)  # a wrong rule shows now
    baseline_options(config.get("baseline"))  # and not at the end
    write_run_files(config, folder)
    announce(config, data, module, trainer, folder, resume)
    if resume is None:
        start_weights(config, module, data, trainer)
    try:
        with stop.listening(signal.SIGINT):
            fit(trainer, module, data, resume)
            checkpoints.save(trainer)
            writer.join()
    except Preempted:
        writer.join()  # all ranks are here
        raise
    except KeyboardInterrupt:
        writer.teardown()
        raise
    except BaseException:
        writer.teardown()
        # The ranks that Lightning started here would wait for this one.
        if hasattr(trainer.strategy.launcher, "kill"):
            trainer.strategy.launcher.kill(signal.SIGKILL)  # pyright: ignore
        raise
    if stop.reason:
        if trainer.is_global_zero:
            say(f"stopped at step {trainer.global_step}; go on with: train.py resume={folder}")
        if stop.reason == INTERRUPT:
            raise KeyboardInterrupt
        raise Preempted(f"preempted at step {trainer.global_step}, which is saved")
    if module.val_step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    summary = summarize(config, data, module, trainer, time.time() - started)
    finish(summary, data, folder)
    return summary


def fit(
    trainer: L.Trainer, module: TokenizerModule, data: VistokDataModule, resume: Path | None
) -> None:
    """Train to the end, or until a signal ends the run.

    Raises:
        VistokError: if another rank ended or is silent.
    """
    with warnings.catch_warnings():
        # The batches come from an endless stream: the loaders' state is the DataModule's.
        warnings.filterwarnings("ignore", message=".*mid-epoch.*")
        try:
            trainer.fit(
                module,
                datamodule=data,
                ckpt_path=None if resume is None else str(resume),
                weights_only=True,
            )
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
        except Exception as error:
            if trainer.world_size > 1 and is_of_a_collective(error):
                first = " ".join(str(error).split())[:160]
                raise VistokError(
                    "another rank ended, or gave no answer for trainer.timeout seconds; its own "
                    f"error says why ({first})"
                ) from error
            raise


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an exception says that ranks lost each other."""
    words = ("gloo", "nccl", "process group", "connection closed by peer")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def check_same_architecture(module: TokenizerModule, content: dict, path: Path) -> None:
    """Refuse a checkpoint of another architecture before training starts."""
    load_weights(module, content["state_dict"], str(path))


def start_weights(
    config: dict[str, Any], module: TokenizerModule, data: VistokDataModule, trainer: L.Trainer
) -> None:
    """Weights of a fresh run: those of `init_from`, else an initialisation from data."""
    if config["init_from"]:
        source = load(find_checkpoint_or_export(config["init_from"]))
        load_weights(module.tokenizer, source.state_dict(), str(config["init_from"]))
    else:
        tokenizer = module.tokenizer.to(trainer.strategy.root_device)
        images = data.init_batches(init_images(config, module, data))
        tokenizer.initialize(tokenizer.to_model_range(images))
    if module.ema is not None:
        module.ema.reset()


def init_images(config: dict[str, Any], module: TokenizerModule, data: VistokDataModule) -> int:
    """How many images the initialisation looks at: enough for the codebook, a bounded number."""
    wanted = module.tokenizer.quantizer.num_init_latents
    for_codebook = -(-wanted // module.tokenizer.num_tokens)
    return min(max(config["init_images"], for_codebook), max(4096, config["init_images"]))


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
    config: dict[str, Any],
    data: VistokDataModule,
    module: TokenizerModule,
    trainer: L.Trainer,
    folder: Path,
    resume: Path | None,
) -> None:
    """What this run is, in a few lines."""
    t = module.tokenizer
    parameters = sum(p.numel() for p in t.parameters()) / 1e6
    verb = f"resuming {resume}" if resume is not None else "training"
    batch = f"{data.batch_size} x {trainer.world_size}"
    if trainer.accumulate_grad_batches > 1:
        batch += f" x {trainer.accumulate_grad_batches}"
    per_step = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    say(
        f"vistok {vistok.__version__} ({Path(vistok.__file__).parent})\n"
        f"{verb}: {type(t).__name__} with {type(t.quantizer).__name__}, {parameters:.2f} M "
        f"parameters, {t.num_tokens} tokens = {t.bits_per_image:.0f} bits per image\n"
        f"data: {data.num_train} training and {data.num_val} validation images of "
        f"{t.image_size[0]}x{t.image_size[1]}\n"
        f"trainer: {trainer.max_steps} steps of {per_step} images ({batch}), "
        f"{trainer.accelerator.__class__.__name__} x {trainer.world_size}, {trainer.precision}\n"
        f"run folder: {folder}"
    )


def summarize(
    config: dict[str, Any],
    data: VistokDataModule,
    module: TokenizerModule,
    trainer: L.Trainer,
    seconds: float,
) -> dict[str, Any]:
    """The numbers of a finished run."""
    results = module.val_results
    watch = next(c for c in trainer.callbacks if isinstance(c, CodebookWatch))  # type: ignore
    summary: dict[str, Any] = {
        "val_psnr": results["psnr"],
        "val_ssim": results["ssim"],
        "val_codebook_usage": results["codebook_usage"],
        "val_perplexity": results["perplexity"],
        "codebook_usage": watch.last["codebook_usage"],  # of the last training window
        "perplexity": watch.last["perplexity"],
        "bits_per_image": results["bits_per_image"],
        "steps": trainer.global_step,
        "samples_seen": data.samples_seen,
    }
    options = baseline_options(config.get("baseline"))
    if options and trainer.is_global_zero:
        summary.update(kmeans_baseline(data, module.tokenizer, **options))
    summary["seconds"] = round(seconds, 1)
    summary["skipped_images"] = len(set().union(*distributed.gather(list(data.skipped))))
    return summary


@rank_zero_only
def finish(summary: dict[str, Any], data: VistokDataModule, folder: Path) -> None:
    """Write `summary.json` and print it."""
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps({**summary, "data": data.describe()}, indent=2) + "\n").encode())
    table = Table(title=f"{folder}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    say(table)
    if report := data.skipped_report():
        say(f"[yellow]{report}[/yellow]")
    say(
        f"pictures: {folder}/pictures\n"
        f"next: eval.py run={folder}\n"
        f"      scripts/export.py run={folder} out=exported/my_tokenizer"
    )


def quiet_libraries() -> None:
    """Silence what the libraries say to developers rather than to users."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*heckpoint directory.*exists and is not empty.*",
        ".*Experiment logs directory.*",
        ".*litlogger.*",
        ".*isinstance.treespec.*",
        ".*`pin_memory`.*",
        ".*`broadcast_buffers` is deprecated.*",  # only in the newest torch
        ".*sync_dist=True.*",  # what is logged is reduced already
        ".*returned a view tensor.*",  # FSDP2; nothing works in place on a block's output
    ):
        warnings.filterwarnings("ignore", message=message)
