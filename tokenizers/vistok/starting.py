"""From the words of `vistok train` to a run: its config, its folder, and what it continues.

What can be wrong without torch is found before it is imported.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vistok
from vistok.core import configuration as c
from vistok.core.errors import CheckpointError, ConfigError, DataError, Preempted
from vistok.core.files import what_is_there
from vistok.core.interrupts import deferred
from vistok.core.plugins import import_plugins
from vistok.core.run_folders import claim_new, held, leads
from vistok.core.schema import check_run, check_sizes
from vistok.core.terminal import show, typed
from vistok.core.words import launched_from_outside, quoted, split, value_of

#: Flags that ask Hydra for something else than a run.
_ASKING = ("--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p", "--hydra-help")


def train(argv: list[str]) -> None:
    """Train, or resume a run, as the words say."""
    overrides, folders, flags = split(argv)
    asking = any(flag.partition("=")[0] in _ASKING for flag in flags)
    if leads() and not asking:
        show(f"vistok {vistok.__version__} ({Path(vistok.__file__).parent})")  # a sign of life
    resume = value_of(overrides, "resume")
    if "resume=" in overrides:
        raise ConfigError(f"resume=: which run? for example: {typed('train')} resume=runs/<run>")
    many = "--multirun" in flags or "-m" in flags
    key = "hydra.sweep.dir" if many else "hydra.run.dir"
    for word in overrides:
        if word.startswith(f"{key}=") and word.partition("=")[2].strip("'\"") in ("", "null"):
            raise ConfigError(f"{word}: name a folder, such as {key}=runs/mine, or leave it out")
    if not value_of(overrides, key):
        if resume == "auto":
            raise ConfigError(f"resume=auto: in which folder? add {key}=runs/<name>")
        if launched_from_outside() and not resume:
            raise ConfigError(
                f"{key} is not set: processes that torchrun or srun start must agree on a run "
                f"folder; add {key}=runs/<name>"
            )
    if resume and resume != "auto":
        return _resume(Path(resume), [o for o in overrides if not o.startswith("resume=")])
    if not flags and c.is_plain(overrides, folders):
        return _train_here(overrides, folders)
    # Composed here for errors that people can read, then again by Hydra, which owns --multirun,
    # launchers and sweepers.
    for job in c.sweep(overrides) if many else [overrides]:
        check_new(c.to_container(c.compose("train", job, folders)))
    if not asking and leads() and not value_of(overrides, key):
        name = "sweep" if many else "run"
        overrides.append(quoted(f"{key}={claim_new(c.hydra_folder(name, overrides, folders))}"))
    _hydra_main(overrides, folders, flags)


def check_new(config: dict[str, Any]) -> None:
    """Check what shows without torch of a composed config.

    Raises:
        VistokError: naming the key, or the folder that is missing.
    """
    check_run(config)
    check_sizes(config)
    if config["resume"] == "auto" and config["overwrite"]:
        raise ConfigError("overwrite=true: resume=auto continues what is there; give one of both")
    check_places(config["data"])


def check_places(data: dict[str, Any]) -> None:
    """Raise if a folder of images is not there.

    Raises:
        DataError: naming it.
    """
    from vistok.data.checks import check_places as check_kind
    from vistok.data.places import as_path

    if data["kind"] == "tokens":  # which the manifest says more of
        return
    train, val = as_path(data["train"]), as_path(data["val"])
    check_kind(data["kind"], train, val)
    for key, place in {"train": train, "val": val}.items() if data["kind"] == "folder" else ():
        if isinstance(place, str) and "://" not in place:
            folder = Path(os.path.expanduser(place))
            if not folder.exists():
                raise DataError(f"data.{key}={place}: no such folder{what_is_there(folder)}")


def _resume(place: Path, words: list[str]) -> None:
    """Continue a run in its own folder; a checkpoint that lies alone, in a new one."""
    run, checkpoint = _run_of(place)
    alone = not (run / "config.yaml").is_file()
    target = value_of(words, "hydra.run.dir")
    if target and not alone and Path(target).resolve() != run.resolve():
        raise ConfigError(
            f"hydra.run.dir={target}: a resumed run goes on in its own folder, {run}; leave it out"
        )
    hydra = [word for word in words if word.startswith(("hydra.", "hydra/"))]
    words = [word for word in words if word not in hydra]
    if alone:
        from vistok.checkpoints.read import read_config

        stored, source = read_config(checkpoint), str(checkpoint)
    else:
        from vistok.checkpoints.resume import stored_config

        stored, source = stored_config(run), str(run / "config.yaml")
    config = resumed(stored, words, source)
    if not alone:
        with held(run):
            _run_training(config, run, checkpoint, is_resumed=True)
        return
    if target is None and launched_from_outside():
        raise ConfigError(f"resume={place}: lies in no run folder; add hydra.run.dir=runs/<name>")
    if target is None and leads():
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        target = str(claim_new(Path("runs") / f"{stamp}_{config['name']}"))
        sys.argv = [*sys.argv, quoted(f"hydra.run.dir={target}")]  # for the other ranks
    folder = Path(target or "runs")
    with held(folder, is_new=True):
        _run_training(config, folder, checkpoint, is_resumed=True)


def resumed(stored: dict[str, Any], words: Sequence[str], source: str) -> dict[str, Any]:
    """Return the config with which a run goes on: its own, and the words on top.

    Args:
        stored: the run's config; changed in place.
        words: `key=value`.
        source: the file that it is from, for errors.

    Raises:
        CheckpointError: if the stored config is damaged.
        ConfigError: if a word is wrong, or the run needs modules that no word names.
    """
    stored["overwrite"] = False  # the run that it replaced is gone
    stored["debug"] = bool(stored.get("debug")) and stored["debug"] is True
    try:
        check_run(stored)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    own = [stored["plugins"]] if isinstance(stored["plugins"], str) else list(stored["plugins"])
    for word in words:  # the one group that a run does not have to keep
        if word.lstrip("+").startswith("logger="):
            chosen = c.to_container(c.compose("train", [word.lstrip("+")]))
            stored["logger"] = {"project": None, "offline": None, **chosen["logger"]}
    words = [word for word in words if not word.lstrip("+").startswith("logger=")]
    config = c.to_container(c.apply_overrides(c.closed(stored), words))
    check_run(config)
    check_sizes(config)
    if not any(word.lstrip("+").startswith("plugins=") for word in words):
        if own:
            raise ConfigError(
                f"{source}: names plugins=[{','.join(own)}], which would run code; if you trust "
                f"it, add plugins=[{','.join(own)}] to the command"
            )
        config["plugins"] = []
    check_places(config["data"])
    return config


def _run_of(path: Path) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint that `resume=` names."""
    from vistok.checkpoints.find import run_folder
    from vistok.checkpoints.seals import is_checkpoint

    if is_checkpoint(path):
        return run_folder(path), path
    from vistok.checkpoints.resume import newest_whole

    c.load_run_config(path)  # raises if there is no such run
    checkpoint = newest_whole(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: has no checkpoint yet (checkpoints/last.ckpt); start the run again, with "
            f"hydra.run.dir={path} overwrite=true"
        )
    return path, checkpoint


def _train_here(overrides: list[str], folders: list[Path]) -> None:
    """A single run, in this process, for which the config is composed once."""
    config, folder, words = c.compose_run(overrides, folders)
    check_new(config)
    folder = _relative(Path(os.path.abspath(folder)))
    if leads() and not value_of(overrides, "hydra.run.dir"):
        folder = claim_new(folder)
    before = sys.argv
    dirs = [f"--config-dir={path}" for path in folders]
    # The ranks must agree on the folder.
    sys.argv = _command_of_ranks([*words, quoted(f"hydra.run.dir={folder}"), *dirs])
    try:
        _start_or_resume(config, folder, words)
    finally:
        sys.argv = before


def _command_of_ranks(words: list[str]) -> list[str]:
    """Return the command with which Lightning starts the other ranks: it reads `sys.argv`."""
    command = sys.argv[1:2] if sys.argv[1:2] == ["train"] else []  # `vistok train`, not train.py
    return [sys.argv[0], *command, *words]


def _hydra_main(overrides: list[str], folders: list[Path], flags: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    failures: list[BaseException] = []
    jobs: list[tuple[Path, list[str], dict[str, Any]]] = []
    before, told = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    command = _command_of_ranks([*overrides, *flags])

    def task(config: DictConfig) -> None:
        if any(isinstance(error, (KeyboardInterrupt, Preempted)) for error in failures):
            return  # the sweep is over
        sys.argv = command  # Hydra has read its own
        folder = _relative(Path(HydraConfig.get().runtime.output_dir))
        words = list(HydraConfig.get().overrides.task)
        try:
            plain = c.to_container(config)
            check_new(plain)
            summary = _start_or_resume(plain, folder, words)
            jobs.append((folder, words, summary or {}))
        except (Exception, KeyboardInterrupt) as error:
            # Hydra would print its own report above ours; a sweep goes on with its next job.
            if "basic_launcher" not in HydraConfig.get().launcher._target_:
                raise  # this is another process, whose launcher must see it
            failures.append(error)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    search = [f"'file://{p.resolve()}'" for p in [*c.user_config_dirs(), *folders]]
    if search:
        flags = [*flags, f"hydra.searchpath=[{','.join(search)}]"]
    sys.argv = [before[0], *overrides, *flags]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are ours to tell; Hydra would print a traceback
    try:
        hydra.main(version_base="1.3", config_path=str(c.config_dir()), config_name="train")(task)()
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if told is not None:
            os.environ["HYDRA_FULL_ERROR"] = told
    if len(jobs) > 1 and leads():
        from vistok.training.run_folder import compare

        compare(jobs)
    if failures:
        raise failures[0]


def _start_or_resume(
    config: dict[str, Any], folder: Path, words: list[str]
) -> dict[str, Any] | None:
    """Train; with resume=auto, from the checkpoints of the folder, if the run is not finished."""
    if config["resume"] != "auto":
        with held(folder, is_new=True, overwrite=config["overwrite"]):
            return _run_training(config, folder, words=words)
    from vistok.checkpoints.resume import finished_steps, newest_whole

    with held(folder):
        steps = finished_steps(folder)
        if steps >= config["trainer"]["max_steps"]:
            if leads():
                show(f"{folder}: finished at step {steps}; nothing to do")
            return None
        return _run_training(config, folder, newest_whole(folder), words)


def _run_training(
    config: dict[str, Any],
    folder: Path,
    checkpoint: Path | None = None,
    words: list[str] | None = None,
    is_resumed: bool = False,
) -> dict[str, Any]:
    """Import what trains, and train.

    Args:
        config: checked.
        folder: held.
        checkpoint: to continue from.
        words: the config was composed with.
        is_resumed: the config is a stored one, whose words may come from a stranger.
    """
    if leads():
        show("importing torch and lightning")
    with deferred():
        import_plugins(config["plugins"], from_here=not is_resumed)
        from vistok.core.registry import resolve
        from vistok.training.run import train as run

        task = resolve(config.get("task", "reconstruction"), kind="task", key="task")
    return run(task, config, folder, checkpoint, words)


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
