"""The command line; light until there is something to compute."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vistok.core.errors import ConfigError, Preempted, VistokError, nearest
from vistok.core.interrupts import deferred, ignore
from vistok.core.leaving import ends_with
from vistok.core.plugins import import_plugins
from vistok.core.terminal import typed
from vistok.core.words import launched_from_outside, split, take_folders, value_of, wants_help


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vistok COMMAND ...`, and return the exit code."""
    if argv is None:
        return _last(main(sys.argv[1:]))
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
    if wants_help(argv):
        from vistok.help import train_help

        return train_help()
    from vistok.starting import train

    train(argv)


def _evaluate(argv: list[str]) -> None:
    if wants_help(argv):
        from vistok.help import eval_help

        return eval_help()
    from vistok.core import configuration as c

    overrides, folders, _ = split(argv)
    data = [o for o in overrides if o.lstrip("+").startswith(("data.", "data="))]
    own = [o for o in overrides if o not in data]
    config = c.compose("eval", own, folders)
    if not any(value_of(own, key) for key in ("run", "model", "images")):
        raise ConfigError(f"run: which run? for example: {typed('eval')} run=runs/<run>")
    plain = _checked(c.to_container(config), "EVAL")
    with deferred():
        from vistok.checkpoints.load import task_of

        import_plugins(config.plugins)
        # Exports and pictures are of tokenizers.
        task = task_of(None if config.model or config.images else config.run)
    task.evaluate(plain, data)


def _export(argv: list[str]) -> None:
    if wants_help(argv):
        from vistok.help import export_help

        return export_help()
    from vistok.core import configuration as c

    overrides, folders, _ = split(argv)
    config = c.compose("export", overrides, folders)
    for key in ("run", "out"):
        if not value_of(overrides, key):
            raise ConfigError(
                f"{key} is missing; use: {typed('export')} run=runs/<run> out=exported/<name>"
            )
    _checked(c.to_container(config), "EXPORT")
    with deferred():
        from vistok.export.exporter import export_run

    import_plugins(config.plugins)
    if config.layout is not None:
        from vistok.export.original import export_original

        for key in ("push", "license", "graphs"):
            if config[key] is not None:
                raise ConfigError(
                    f"{key}={config[key]}: not with layout={config.layout}; leave one of them out"
                )
        export_original(
            Path(config.run), Path(config.out), config.layout, config.weights, config.overwrite
        )
        return
    graphs = [config.graphs] if isinstance(config.graphs, str) else list(config.graphs or ())
    words = (config.weights, config.overwrite, config.license, config.push, graphs)
    export_run(Path(config.run), Path(config.out), *words)


def _by_schema(name: str, module: str, function: str = "") -> Callable[[list[str]], None]:
    """Return a command of vistok.export that takes the keys of its `configs/NAME.yaml`."""

    def command(argv: list[str]) -> None:
        from vistok.core import configuration as c
        from vistok.help import config_help

        if wants_help(argv):
            return config_help(name)
        import importlib

        schema = name.replace("-", "_")
        takes_data = name in ("tokenize", "near-codes")
        # Hydra takes a,b for a sweep.
        words = [re.sub(r"^format=(\w+(,\w+)+)$", r"format=[\1]", word) for word in argv]
        overrides, folders, _ = split(words)
        data = [o for o in overrides if takes_data and o.startswith(("data.", "data="))]
        own = [o for o in overrides if o not in data]
        config = c.compose(schema, own, folders)
        for key in c.required(schema):
            if not value_of(own, key):
                raise ConfigError(f"{key} is missing; see {typed(name)} --help")
        with deferred():
            run = getattr(importlib.import_module(f"vistok.export.{module}"), function or module)

        import_plugins(config.plugins)
        run(c.to_container(config), *([data] if takes_data else []))

    return command


def _import_weights(argv: list[str]) -> None:
    if wants_help(argv):
        from vistok.help import import_help

        return import_help()
    from vistok.core import configuration as c

    overrides, folders, _ = split(argv)
    config = c.compose("import", overrides, folders)
    for key in ("source", "weights", "out"):
        if not value_of(overrides, key):
            raise ConfigError(
                f"{key} is missing; use: {typed('import-weights')} source=NAME weights=FILE "
                "out=exported/<name>"
            )
    _checked(c.to_container(config), "IMPORT")
    with deferred():
        from vistok.export.importer import import_weights as run

    import_plugins(config.plugins)
    said = None if config.config is None else Path(config.config)
    files = (Path(config.weights), Path(config.out))
    run(config.source, *files, config.image_size, config.overwrite, said)


def _checked(config: dict, schema: str) -> dict:
    """Return a config whose keys have been held to a schema of `core.command_schemas`."""
    from vistok.core import command_schemas
    from vistok.core.schema import check_keys

    check_keys(config, getattr(command_schemas, schema))
    return config


def _list(argv: list[str]) -> None:
    from vistok.help import list_help, listing

    if wants_help(argv):
        return list_help()
    words, folders = take_folders(argv)
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
        return _last(_guarded(command, sys.argv[1:]))
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
            full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
            where = cause.filename or ("a file could not be written" if full else "")
            return _fail(f"{where}: {cause.strerror}".lstrip(": "))
        if _is_out_of_memory(error):
            return _fail(
                "out of memory; try a smaller data.batch_size or data.image_size, or a smaller "
                "model (debug=true shows where)",
                1,
            )
        name = type(error).__name__
        first = " ".join(str(error).split())[:300]
        return _fail(f"{name}: {first} (debug=true shows where)", 1)


def _last(code: int) -> int:
    """Return the exit code of a process that has said all it has to say."""
    ignore()
    return ends_with(code)


def _is_out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    words = (
        "memoryerror",
        "outofmemory",
        "out of memory",
        "can't allocate memory",
        "you tried to allocate",
    )
    return any(word in text for word in words)


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
    child = os.environ.get("LOCAL_RANK", "0") != "0" and not launched_from_outside()
    return 0 if child else _fail(message, code)


def _fail(message: str, code: int = 2) -> int:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK")
    who = f"rank {rank}: " if rank not in (None, "", "0") else ""
    print(f"error: {who}{message}", file=sys.stderr)
    return code


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


if __name__ == "__main__":
    sys.exit(main())
