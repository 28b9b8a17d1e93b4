"""The engine: train a task, from a config to a run folder."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from vistok.checkpoints.load import load_weights
from vistok.checkpoints.migrate import in_todays_form
from vistok.checkpoints.read import read_checkpoint
from vistok.checkpoints.resume import finished_steps
from vistok.core import ranks
from vistok.core.console import say
from vistok.core.errors import CheckpointError, ConfigError, Preempted, VistokError
from vistok.core.run_folders import leads
from vistok.core.schema import check_run
from vistok.core.terminal import typed
from vistok.core.words import launched_from_outside
from vistok.data.places import absolute
from vistok.training.checkpointing import Checkpoints, CheckpointWriter
from vistok.training.data import TrainingData
from vistok.training.lightning_internals import watch_children_by
from vistok.training.optimizers import learning_rate
from vistok.training.peers import ChildWatch, end_with_parent
from vistok.training.run_folder import BeginRun, announce, finish, tell
from vistok.training.sharding import ShardWriter
from vistok.training.stopping import INTERRUPT, PREEMPTION_SIGNALS, StopAfterStep
from vistok.training.task import Task
from vistok.training.trainer import build_trainer, float32_products, set_batches


def train(
    task_type: type[Task],
    config: dict[str, Any],
    folder: Path,
    resume: Path | None = None,
    words: Sequence[str] | None = None,
    watch: Sequence[L.Callback] = (),
) -> dict[str, Any]:
    """Train a task.

    Args:
        task_type: what is trained.
        config: resolved, as plain containers.
        folder: the run folder to write to.
        resume: checkpoint file to continue from.
        words: `key=value` that the config was composed with; None if it is that of `resume`.
        watch: further callbacks.

    Returns:
        What `summary.json` holds.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended the run.
        Preempted: if a signal of the scheduler did.
    """
    stop = StopAfterStep()
    products = float32_products(config["trainer"].get("matmul_precision", "highest"))
    finished = threading.Event()
    if not leads() and not launched_from_outside():
        end_with_parent(finished)
    try:
        # A scheduler may ask at any time, and again while the last checkpoint is being written.
        with products, stop.listening(*PREEMPTION_SIGNALS):
            return _train(task_type, config, folder, resume, words, stop, watch)
    finally:
        finished.set()


def _train(
    task_type: type[Task],
    config: dict[str, Any],
    folder: Path,
    resume: Path | None,
    words: Sequence[str] | None,
    stop: StopAfterStep,
    watch: Sequence[L.Callback],
) -> dict[str, Any]:
    started = time.time()
    quiet_libraries()
    config = in_todays_form(config)
    config["data"] = absolute(config["data"])  # for a resume in another working folder
    if resume is None:
        config = task_type.resolve(config, words or ())
    elif words is not None:
        source = config.get("init_from")
        if source:  # which may be gone by now
            config["init_from"] = str(resume)
        config = {**task_type.resolve(config, words), "init_from": source}
    check_run(config)  # fills in what an older run does not have
    L.seed_everything(config["seed"], verbose=False)
    tell("building the model")
    task = task_type(config)  # before the data: a wrong size shows at once
    data = task.build_data()
    first_step = 0
    sharded = config["trainer"]["strategy"] == "fsdp2"
    if resume is not None:
        if resume.is_dir() != sharded:
            said = "" if resume.is_dir() else "not "
            raise ConfigError(
                f"trainer.strategy={config['trainer']['strategy']}: {resume} was {said}written with"
                " fsdp2; keep the strategy of the run, or start a new one with init_from"
            )
        tell(f"reading {resume}")
        content = read_checkpoint(resume, without=["optimizer_states"])
        first_step = int(content["global_step"])
        # Without a summary the run was killed after its last step, and is yet to be finished.
        if config["trainer"]["max_steps"] <= min(first_step, finished_steps(folder)):
            raise ConfigError(
                f"trainer.max_steps={config['trainer']['max_steps']}: {resume} is already at step "
                f"{first_step}; set a larger trainer.max_steps to continue"
            )
        take(task, data, content, resume)
        del content
    tell("reading the list of images")
    data.prepare_data()
    with damaged_if_unexpected(resume):
        data.setup("fit")
    callbacks = config["callbacks"]
    writer = (ShardWriter if sharded else CheckpointWriter)(
        callbacks.get("keep_last", 2), callbacks.get("background_checkpoints", True)
    )
    checkpoints = Checkpoints(folder / "checkpoints", callbacks["checkpoint_every"], writer)
    watch_children_by(lambda children: ChildWatch(children).start())
    own = [*task.callbacks(folder), *watch]
    trainer = build_trainer(config, folder, first_step, stop, checkpoints, own)
    if task.objective.players and trainer.precision == "16-mixed":
        names = ", ".join(task.objective.players)
        raise ConfigError(
            f"trainer.precision=16: does not work with loss.terms.{names}; use bf16 or 32"
        )
    set_batches(config, data, trainer)
    task.settle(trainer, data)
    learning_rate(config["optimizer"], 1)  # a wrong rule shows now
    announce(task, data, trainer, folder, resume)
    if resume is None:
        task.start_weights(data, trainer.strategy.root_device)
        task.objective.start()
    begin = BeginRun(config, folder, resume)
    trainer.callbacks.insert(0, begin)  # pyright: ignore[reportAttributeAccessIssue]
    if config["compile"]:
        tell("compiling in the first step, which takes a minute or more")
    with stop.listening(signal.SIGINT):  # also while the last checkpoint is written
        try:
            fit(trainer, task, data, resume, begin)
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
            command = f"{typed('train')} resume={folder}"
            say(f"stopped at step {trainer.global_step}; continue with: {command}")
        if stop.reason == INTERRUPT:
            raise KeyboardInterrupt
        raise Preempted(f"preempted at step {trainer.global_step}, which is saved")
    if task.validated_step != trainer.global_step:
        trainer.validate(task, datamodule=data, verbose=False)  # type: ignore[arg-type]
        if checkpoints.save_if_best(trainer, task):
            checkpoints.save(trainer)  # which holds the best score, for a run that goes on
            writer.join()
    summary = task.summary(trainer) | task.guard.summary() | task.health.summary()
    summary |= {"steps": trainer.global_step, "samples_seen": data.samples_seen}
    if resume is not None:
        summary["resumed_at_step"] = first_step
    summary["seconds"] = round(time.time() - started, 1)  # of this call
    summary["seconds_of_all_calls"] = round(begin.seconds_before + time.time() - started, 1)
    summary["skipped_images"] = len(set().union(*ranks.gather(list(data.skipped))))
    finish(summary, task, data, folder)
    return summary


def take(task: Task, data: TrainingData, content: dict[str, Any], resume: Path) -> None:
    """Give a task and its data what a checkpoint holds, so that what does not fit shows at once.

    Raises:
        CheckpointError: if weights or position are damaged, or of another architecture.
    """
    with damaged_if_unexpected(resume):
        load_weights(task, content["state_dict"], str(resume))
        if task.ema is not None and content.get("ema"):
            averages = content["ema"]["weights"]
            own = {name: value.shape for name, value in task.ema.shadow.items()}
            for name, shape in own.items():
                if name not in averages or averages[name].shape != shape:
                    raise CheckpointError(
                        f"{resume}: the average of '{name}' is missing or another"
                    )
        state = content[type(data).__qualname__]
        data.expect(state)
        task.plan_schedule(content, state["samples_seen"], resume)


@contextmanager
def damaged_if_unexpected(resume: Path | None) -> Iterator[None]:
    """Say of an exception that is not ours that the checkpoint is damaged."""
    try:
        yield
    except (VistokError, OSError):
        raise
    except Exception as error:
        if resume is None:
            raise
        said = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{resume}: damaged; it cannot be restored ({type(error).__name__}: {said})"
        ) from error


def fit(trainer: L.Trainer, task: Task, data: Any, resume: Path | None, begin: BeginRun) -> None:
    """Train to the end, or until a signal ends the run.

    Raises:
        VistokError: if another rank ended or is silent, or the checkpoint cannot be restored.
    """
    with warnings.catch_warnings():
        # The batches come from an endless stream: the loaders' state is the DataModule's.
        warnings.filterwarnings("ignore", message=".*mid-epoch.*")
        try:
            trainer.fit(
                task,
                datamodule=data,
                ckpt_path=None if resume is None else str(resume),
                weights_only=True,
            )
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
        except Exception as error:
            if trainer.world_size > 1 and is_of_a_collective(error):
                first = " ".join(str(error).split())[:160]
                raise VistokError(f"{begin.peers.report()} ({first})") from error
            if not begin.begun:
                with damaged_if_unexpected(resume):
                    raise
            raise


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether an exception says that ranks lost each other."""
    words = ("gloo", "nccl", "process group", "connection closed by peer")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def quiet_libraries() -> None:
    """Silence what the libraries say to developers rather than to users."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
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
