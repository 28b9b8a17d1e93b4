"""The command line; light until there is something to compute."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vistok.core.errors import ConfigError, Preempted, VistokError, nearest
from vistok.core.leaving import ends_with
from vistok.core.plugins import import_plugins
from vistok.core.terminal import typed
from vistok.core.words import split as _split
from vistok.core.words import take_folders as _take_folders
from vistok.core.words import value as _value
from vistok.core.words import wants_help as _wants_help


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vistok COMMAND ...`, and return the exit code."""
    if argv is None:
        return ends_with(main(sys.argv[1:]))
    argv = list(argv)
    command, *words = argv or ["--help"]
    if command in ("-h", "--help", "help"):
        from vistok.help import overview

        overview()
        return 0
    if command == "--version":
        import vistok

        print(vistok.__version__)
        return 0
    if command not in COMMANDS:
        return _fail(f"{command}: no such command{nearest(command, COMMANDS)}; try vistok --help")
    # Lightning and Hydra start further processes with the same words.
    sys.argv = [sys.argv[0], *argv] if sys.argv[1:] != argv else sys.argv
    return COMMANDS[command](words)


def _train(argv: list[str]) -> None:
    from vistok.core import configuration as c

    if _wants_help(argv):
        from vistok.help import train_help

        return train_help()
    overrides, folders, flags = _split(argv)
    resume = _value(overrides, "resume")
    if "resume=" in overrides:
        raise ConfigError(f"resume=: which run? for example: {typed('train')} resume=runs/<run>")
    many = "--multirun" in flags or "-m" in flags
    key = "hydra.sweep.dir" if many else "hydra.run.dir"
    if not _value(overrides, key):
        if resume == "auto":
            raise ConfigError(f"resume=auto: in which folder? add {key}=runs/<name>")
        if _launched_from_outside() and not resume:
            raise ConfigError(
                f"{key} is not set: processes that torchrun or srun start must agree on a run "
                f"folder; add {key}=runs/<name>"
            )
    if resume and resume != "auto":
        from vistok.checkpoints.resume import stored_config

        rest = [o for o in overrides if not o.startswith("resume=")]
        run, checkpoint = _run_of(Path(resume))
        config = c.apply_overrides(c.closed(stored_config(run)), rest)
        _run_training(c.to_container(config), run, checkpoint)
        return
    if not flags and c.is_plain(overrides, folders):
        return _train_here(overrides, folders)
    # Composed here for errors that people can read, then again by Hydra, which owns --multirun,
    # launchers and sweepers.
    for job in c.sweep(overrides) if many else [overrides]:
        c.to_container(c.compose("train", job, folders))
    _hydra_main(overrides, folders, flags)


def _train_here(overrides: list[str], folders: list[Path]) -> None:
    """A single run, in this process, for which the config is composed once."""
    from vistok.core import configuration as c

    config, folder, words = c.compose_run(overrides, folders)
    folder = _relative(Path(os.path.abspath(folder)))
    folder.mkdir(parents=True, exist_ok=True)
    before = sys.argv
    # Lightning starts the other ranks with these words: they must agree on the folder.
    command = before[1:2] if before[1:2] == ["train"] else []  # of `vistok train`, not of train.py
    dirs = [f"--config-dir={path}" for path in folders]
    sys.argv = [before[0], *command, *words, c.quoted(f"hydra.run.dir={folder}"), *dirs]
    try:
        _start_or_resume(config, folder, words)
    except BaseException:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    finally:
        sys.argv = before


def _hydra_main(overrides: list[str], folders: list[Path], flags: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from vistok.core import configuration as c

    failures: list[BaseException] = []
    before, told = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    command = before[1:2] if before[1:2] == ["train"] else []  # of `vistok train`, not of train.py

    def task(config: DictConfig) -> None:
        if any(isinstance(error, (KeyboardInterrupt, Preempted)) for error in failures):
            return  # the sweep is over
        # Lightning starts the other ranks with these words; Hydra has read its own.
        sys.argv = [before[0], *command, *overrides, *flags]
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            words = list(HydraConfig.get().overrides.task)
            _start_or_resume(c.to_container(config), _relative(folder), words)
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
    if failures:
        raise failures[0]


def _start_or_resume(config: dict, folder: Path, words: list[str]) -> None:
    """Train; with resume=auto, from the checkpoints of the folder, if the run is not finished."""
    if config["resume"] != "auto":
        return _run_training(config, folder, words=words)
    from vistok.checkpoints.resume import finished_steps, newest_whole
    from vistok.core.console import say

    steps = finished_steps(folder)
    if steps >= config["trainer"]["max_steps"]:
        say(f"{folder}: finished at step {steps}; nothing to do")
    else:
        _run_training(config, folder, newest_whole(folder), words)


def _run_training(
    config: dict, folder: Path, checkpoint: Path | None = None, words: list[str] | None = None
) -> None:
    import_plugins(config["plugins"])
    from vistok.core.registry import resolve
    from vistok.training.run import train as run

    task = resolve(config.get("task", "reconstruction"), kind="task", key="task")
    run(task, config, folder, checkpoint, words)


def _evaluate(argv: list[str]) -> None:
    if _wants_help(argv):
        from vistok.help import eval_help

        return eval_help()
    from vistok.core import configuration as c

    overrides, folders, _ = _split(argv)
    data = [o for o in overrides if o.lstrip("+").startswith(("data.", "data="))]
    own = [o for o in overrides if o not in data]
    config = c.compose("eval", own, folders)
    if not any(_value(own, key) for key in ("run", "model", "images")):
        raise ConfigError(f"run: which run? for example: {typed('eval')} run=runs/<run>")
    from vistok.checkpoints.load import task_of

    import_plugins(config.plugins)
    run = None if config.model or config.images else config.run  # those are of tokenizers
    task_of(run).evaluate(c.to_container(config), data)


def _export(argv: list[str]) -> None:
    if _wants_help(argv):
        from vistok.help import export_help

        return export_help()
    from vistok.core import configuration as c

    overrides, folders, _ = _split(argv)
    config = c.compose("export", overrides, folders)
    for key in ("run", "out"):
        if not _value(overrides, key):
            raise ConfigError(
                f"{key} is missing; use: {typed('export')} run=runs/<run> out=exported/<name>"
            )
    from vistok.export.exporter import export_run

    import_plugins(config.plugins)
    words = (config.weights, config.overwrite, config.license, config.push)
    export_run(Path(config.run), Path(config.out), *words)


def _by_schema(name: str, module: str, function: str = "") -> Callable[[list[str]], None]:
    """Return a command of vistok.export that takes the keys of its `configs/NAME.yaml`."""

    def command(argv: list[str]) -> None:
        from vistok.core import configuration as c
        from vistok.help import config_help

        if _wants_help(argv):
            return config_help(name)
        import importlib

        schema = name.replace("-", "_")
        takes_data = name in ("tokenize", "near-codes")
        # Hydra takes a,b for a sweep.
        words = [re.sub(r"^format=(\w+(,\w+)+)$", r"format=[\1]", word) for word in argv]
        overrides, folders, _ = _split(words)
        data = [o for o in overrides if takes_data and o.startswith(("data.", "data="))]
        own = [o for o in overrides if o not in data]
        config = c.compose(schema, own, folders)
        for key in c.required(schema):
            if not _value(own, key):
                raise ConfigError(f"{key} is missing; see {typed(name)} --help")
        import_plugins(config.plugins)
        run = getattr(importlib.import_module(f"vistok.export.{module}"), function or module)
        run(c.to_container(config), *([data] if takes_data else []))

    return command


def _import_weights(argv: list[str]) -> None:
    if _wants_help(argv):
        from vistok.help import import_help

        return import_help()
    from vistok.core import configuration as c

    overrides, folders, _ = _split(argv)
    config = c.compose("import", overrides, folders)
    for key in ("source", "weights", "out"):
        if not _value(overrides, key):
            raise ConfigError(
                f"{key} is missing; use: import_weights.py source=NAME weights=FILE "
                "out=exported/<name>"
            )
    from vistok.export.importer import import_weights as run

    import_plugins(config.plugins)
    run(config.source, Path(config.weights), Path(config.out), config.image_size, config.overwrite)


def _list(argv: list[str]) -> None:
    from vistok.help import list_help, listing

    if _wants_help(argv):
        return list_help()
    words, folders = _take_folders(argv)
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option; --help shows an example")
    listing(words, folders)


def _tool(name: str) -> Callable[[list[str]], int]:
    """Return the command of a module of vistok.tools, which is imported when it is called."""

    def command(argv: list[str]) -> int:
        import importlib

        return importlib.import_module(f"vistok.tools.{name}").TOOL(argv)

    return command


def _guarded(command: Callable[[list[str]], int | None], argv: Sequence[str] | None) -> int:
    """Run a command; an error that the user can mend becomes one line and exit code 2."""
    if argv is None:
        return ends_with(_guarded(command, sys.argv[1:]))
    argv = list(argv)
    debug = bool(os.environ.get("VISTOK_DEBUG")) or any(map(_asks_for_traceback, argv))
    try:
        return command(argv) or 0
    except KeyboardInterrupt as error:
        return _stopped("; ".join(["interrupted", *map(str, error.args)]), 130)
    except Preempted as error:
        return _stopped(f"{error}; run the same command again", Preempted.EXIT_CODE)
    except VistokError as error:
        if debug:
            raise
        return _fail(str(error))
    except Exception as error:
        cause = _cause(error)
        if debug:
            raise
        if isinstance(cause, VistokError):
            return _fail(str(cause))
        if isinstance(cause, OSError) and cause.errno is not None:
            return _fail(f"{cause.filename or ''}: {cause.strerror}".lstrip(": "))
        name = type(error).__name__
        first = " ".join(str(error).split())[:300]
        return _fail(f"{name}: {first} (debug=true shows where)", 1)


def _asks_for_traceback(word: str) -> bool:
    return word in ("debug=true", "debug=True") or word.startswith("+debug=")


def _cause(error: BaseException) -> BaseException:
    """Return the VistokError behind an exception of a library (Lightning and Hydra wrap ours)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, VistokError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _stopped(message: str, code: int) -> int:
    """Tell that a run ended early and in order, and return its exit code."""
    # Lightning kills all processes as soon as one that it started does not return 0; theirs is
    # not asked for.
    child = os.environ.get("LOCAL_RANK", "0") != "0" and not _launched_from_outside()
    return 0 if child else _fail(message, code)


def _fail(message: str, code: int = 2) -> int:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK")
    who = f"rank {rank}: " if rank not in (None, "", "0") else ""
    print(f"error: {who}{message}", file=sys.stderr)
    return code


def _launched_from_outside() -> bool:
    """Return whether torchrun or srun started this process as one of several."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _run_of(path: Path) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint that `resume=` names."""
    from vistok.checkpoints.find import run_folder
    from vistok.checkpoints.seals import is_checkpoint
    from vistok.core.configuration import load_run_config
    from vistok.core.errors import CheckpointError

    if is_checkpoint(path):
        return run_folder(path), path
    from vistok.checkpoints.resume import newest_whole

    load_run_config(path)  # raises if there is no such run
    checkpoint = newest_whole(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: has no checkpoint yet (checkpoints/last.ckpt); start the run again"
        )
    return path, checkpoint


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


if __name__ == "__main__":
    sys.exit(main())


def _command(run: Callable[[list[str]], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Return a command: it takes words, or those that the process was started with."""

    def command(argv: Sequence[str] | None = None) -> int:
        return _guarded(run, argv)

    return command


train = _command(_train)
evaluate = _command(_evaluate)
export = _command(_export)
import_weights = _command(_import_weights)
tokenize = _command(_by_schema("tokenize", "tokenize"))
detokenize = _command(_by_schema("detokenize", "detokenize"))
vocabulary = _command(_by_schema("vocabulary", "merged", "merge"))
near_codes = _command(_by_schema("near-codes", "near_codes"))
compare = _command(_tool("compare"))
report = _command(_tool("report"))
list_configs = _command(_list)
doctor = _command(_tool("doctor"))
make_shards = _command(_tool("make_shards"))
check_shards = _command(_tool("check_shards"))
bench_data = _command(_tool("bench_data"))

#: What can follow `vistok`; each takes words, and returns the exit code.
COMMANDS: dict[str, Callable[[Sequence[str] | None], int]] = {
    "train": train,
    "eval": evaluate,
    "compare": compare,
    "report": report,
    "export": export,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "vocabulary": vocabulary,
    "near-codes": near_codes,
    "import-weights": import_weights,
    "list": list_configs,
    "doctor": doctor,
    "make-shards": make_shards,
    "check-shards": check_shards,
    "bench-data": bench_data,
}
