"""One training run: from a config to a run folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table

import vistok
from vistok import distributed
from vistok.checkpoint import find_checkpoint, load, load_weights, read_checkpoint
from vistok.console import say
from vistok.data.datamodule import VistokDataModule
from vistok.errors import ConfigError, nearest
from vistok.evaluation.baseline import kmeans_baseline
from vistok.training.callbacks import (
    AtomicCheckpointIO,
    CodebookWatch,
    ContinuedCSVLogger,
    ProgressBar,
    RandomState,
    ReconstructionGrid,
    StopAfterStep,
    ValidationLine,
    checkpoint_callbacks,
)
from vistok.training.module import TokenizerModule
from vistok.training.stages import resolve_stage

PRECISIONS = {
    "bf16": "bf16-mixed",
    "16": "16-mixed",
    "32": "32-true",
    "bf16-mixed": "bf16-mixed",
    "16-mixed": "16-mixed",
    "32-true": "32-true",
}


def train(config: dict[str, Any], folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """Train a tokenizer.

    Args:
        config: resolved, as plain containers.
        folder: the run folder to write to.
        resume: checkpoint file to continue from.

    Returns:
        What `summary.json` holds.
    """
    started = time.time()
    quiet_libraries()
    if resume is None:
        config = resolve_stage(config)
    L.seed_everything(config["seed"], verbose=False)
    data = VistokDataModule(**{k: v for k, v in config["data"].items() if k != "_target_"})
    module = TokenizerModule(config)  # before the data: a wrong size shows at once
    if config["init_from"]:
        find_checkpoint_or_export(config["init_from"])  # as soon as possible too
    data.prepare_data()
    data.setup("fit")
    first_step = 0
    if resume is not None:
        content = read_checkpoint(resume)
        first_step = int(content["global_step"])
        check_same_architecture(module, content, resume)
        if config["trainer"]["max_steps"] <= first_step:
            raise ConfigError(
                f"trainer.max_steps={config['trainer']['max_steps']}: {resume} is already at step "
                f"{first_step}; pass a larger trainer.max_steps to go on"
            )
    trainer = build_trainer(config, folder, first_step)
    write_run_files(config, folder)
    announce(config, data, module, trainer, folder, resume)
    if resume is None:
        start_weights(config, module, data, trainer)
    fit(trainer, module, data, resume)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if any(isinstance(c, StopAfterStep) and c.stopped for c in trainer.callbacks):  # type: ignore
        say(f"stopped at step {trainer.global_step}; go on with: train.py resume={folder}")
        raise KeyboardInterrupt
    if module.val_step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    summary = summarize(config, data, module, trainer, time.time() - started)
    finish(summary, data, folder)
    return summary


def fit(
    trainer: L.Trainer, module: TokenizerModule, data: VistokDataModule, resume: Path | None
) -> None:
    """Train to the end, or until Ctrl-C."""
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    stop = next(c for c in trainer.callbacks if isinstance(c, StopAfterStep))  # type: ignore
    with warnings.catch_warnings(), stop.listening():
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
        finally:
            # After an exception Lightning puts back the handler that it found, which is ours.
            if main_thread:
                signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------- building


def build_trainer(config: dict[str, Any], folder: Path, first_step: int) -> L.Trainer:
    """The Lightning Trainer of a config."""
    options = dict(config["trainer"])
    accelerator = str(options.pop("accelerator"))
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator}: no usable GPU was found; use cpu or auto"
        )
    options["precision"] = precision(options["precision"], accelerator)
    devices, nodes = options.get("devices", 1), options.get("num_nodes", 1)
    strategy: Any = options.pop("strategy")
    show_bar = options.pop("enable_progress_bar")
    many = nodes > 1 or devices not in (1, "1", "auto", [0])
    if devices == "auto":
        many = many or (accelerator != "cpu" and torch.cuda.device_count() > 1)
    if strategy == "auto" and many:
        # Codebook statistics are all-reduced by the quantizers; broadcasting rank 0's buffers
        # before every forward would cost time and hide a mistake.
        strategy = DDPStrategy(broadcast_buffers=False)
    callbacks = config["callbacks"]
    return L.Trainer(
        accelerator=accelerator,
        strategy=strategy,
        **options,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=build_loggers(config, folder, first_step),
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[
            RandomState(),
            StopAfterStep(),
            CodebookWatch(callbacks["codebook_window"]),
            ReconstructionGrid(
                folder / "pictures", callbacks["num_pictures"], callbacks["picture_scale"]
            ),
            ValidationLine(),
            *([ProgressBar()] if show_bar else []),
            *checkpoint_callbacks(folder / "checkpoints", callbacks["checkpoint_every"]),
        ],
    )


def precision(name: Any, accelerator: str) -> str:
    """Lightning's name of a precision; `auto` takes bf16 where the processor computes in it."""
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
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has_units = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bf16-mixed" if has_units else "32-true"


def build_loggers(config: dict[str, Any], folder: Path, first_step: int) -> list[Logger]:
    """CSV always, and wandb or TensorBoard if chosen."""
    loggers: list[Logger] = [ContinuedCSVLogger(folder, first_step)]
    kind = config["logger"]["name"]
    if kind == "tensorboard":
        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    elif kind == "wandb":
        # Without a login wandb would stop and ask; offline runs can be synced later.
        known = os.environ.get("WANDB_API_KEY") or has_wandb_login()
        offline = config["logger"]["offline"] or not known
        if offline and not config["logger"]["offline"] and distributed.rank() == 0:
            say("wandb: not logged in, so this run is kept offline (sync: wandb sync)")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ["WANDB_MODE"] = "offline" if offline else "online"
        loggers.append(
            WandbLogger(
                project=config["logger"]["project"],
                name=folder.name,
                id=folder.name,
                save_dir=str(folder),
                offline=offline,
                config=config,
            )
        )
    return loggers


def has_wandb_login() -> bool:
    """Whether `wandb login` was done on this machine."""
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


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


def find_checkpoint_or_export(path: str) -> Path:
    """`path` if it is an export folder, else the checkpoint in it."""
    folder = Path(path)
    return folder if (folder / "model.safetensors").exists() else find_checkpoint(folder)


def init_images(config: dict[str, Any], module: TokenizerModule, data: VistokDataModule) -> int:
    """How many images the initialisation looks at: enough for the codebook, a bounded number."""
    wanted = module.tokenizer.quantizer.num_init_latents
    for_codebook = -(-wanted // module.tokenizer.num_tokens)
    return min(max(config["init_images"], for_codebook), max(4096, config["init_images"]))


# ---------------------------------------------------------------------- the run folder


@rank_zero_only
def write_run_files(config: dict[str, Any], folder: Path) -> None:
    """The resolved config, the versions and the command."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
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
    say(
        f"vistok {vistok.__version__} ({Path(vistok.__file__).parent})\n"
        f"{verb}: {type(t).__name__} with {type(t.quantizer).__name__}, {parameters:.2f} M "
        f"parameters, {t.num_tokens} tokens = {t.bits_per_image:.0f} bits per image\n"
        f"data: {data.num_train} training and {data.num_val} validation images of "
        f"{t.image_size[0]}x{t.image_size[1]}\n"
        f"trainer: {trainer.max_steps} steps of {data.batch_size * trainer.world_size} images, "
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
    if config["baseline"]["patch_size"] and trainer.is_global_zero:
        summary.update(kmeans_baseline(data, module.tokenizer, **config["baseline"]))
    summary["seconds"] = round(seconds, 1)
    summary["skipped_images"] = len(data.skipped)
    return summary


@rank_zero_only
def finish(summary: dict[str, Any], data: VistokDataModule, folder: Path) -> None:
    """Write `summary.json` and print it."""
    path = folder / "summary.json"
    path.write_text(json.dumps({**summary, "data": data.describe()}, indent=2) + "\n")
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
    ):
        warnings.filterwarnings("ignore", message=message)
