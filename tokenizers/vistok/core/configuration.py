"""Find configs, compose them, and raise errors that name the key.

Light on purpose: `--help` and mistyped overrides are answered without importing torch.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vistok.core.errors import CheckpointError, ConfigError, as_written, nearest
from vistok.core.files import what_is_there
from vistok.core.yaml_file import read_yaml

#: Groups of keys that may be null.
_NULL_FOR_NONE = ("baseline",)


def config_dir() -> Path:
    """Return the folder of vistok's configs: a checkout's `configs/`, else the installed copy."""
    checkout = Path(__file__).resolve().parents[3] / "configs"
    return checkout if (checkout / "train.yaml").exists() else Path(__file__).parents[1] / "configs"


def user_config_dirs() -> list[Path]:
    """Return the folders of the user's configs, which VISTOK_CONFIG_DIR names."""
    return [Path(p) for p in os.environ.get("VISTOK_CONFIG_DIR", "").split(os.pathsep) if p]


def options(group: str, extra_dirs: Iterable[Path] = ()) -> list[str]:
    """Return the names that can be chosen in a config group, for example "experiment"."""
    return sorted(option_files(group, extra_dirs))


def option_files(group: str, extra_dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """Return the file of each name in a group; of one name in two folders, ours."""
    folders = [config_dir(), *user_config_dirs(), *extra_dirs]
    files = [path for folder in reversed(folders) for path in (folder / group).glob("[!_]*.yaml")]
    return {path.stem: path for path in files}


def groups(extra_dirs: Iterable[Path] = ()) -> list[str]:
    """Return the config groups: the folders of configs, without those of Hydra itself.

    A group within a group, such as "loss/perceptual", chooses a part of what that one has.
    """
    folders = [config_dir(), *user_config_dirs(), *extra_dirs]
    found = {
        path.parent.relative_to(folder).as_posix()
        for folder in folders
        for depth in ("*/[!_]*.yaml", "*/*/[!_]*.yaml")
        for path in folder.glob(depth)
    }
    return sorted(name for name in found if name.split("/")[0] != "hydra")


def notes(path: Path) -> list[str]:
    """Return the lines of the comment at the top of a config, without their `# `."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].removeprefix(" "))
    return lines


def header(path: Path) -> str:
    """Return the first sentence of a config's comment."""
    text = ""
    for line in notes(path):
        text = f"{text} {line}".strip()
        if line.endswith((".", ":")):
            break
    return re.split(r"(?<=\.)\s(?=[A-Z])", text)[0].removesuffix(":")


def required(name: str) -> list[str]:
    """Return the keys of a schema that must be given, in the order of its file."""
    written = (config_dir() / f"{name}.yaml").read_text()
    return re.findall(r"^(\w+): \?\?\?", written, re.MULTILINE)


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job that `--multirun` makes of `key=a,b` and its like."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices.append([override.input_line])
        elif override.is_discrete_sweep():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in itertools.product(*choices)]


def compose(
    name: str, overrides: Sequence[str], extra_dirs: Iterable[Path] = (), with_hydra: bool = False
) -> DictConfig:
    """Compose the config `name` with Hydra; once, unless a value looks wrong.

    Args:
        name: of a file in the config folder.
        overrides: `key=value`.
        extra_dirs: folders of further configs.
        with_hydra: keep the key `hydra`.

    Raises:
        ConfigError: in one line, with the nearest valid name.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    folders = [*user_config_dirs(), *extra_dirs]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such config folder")
    search = ",".join(f"'file://{folder.resolve()}'" for folder in folders)
    arguments = list(overrides) + ([f"hydra.searchpath=[{search}]"] if folders else [])
    GlobalHydra.instance().clear()
    try:
        # The job's name is the one that Hydra's own main gives it.
        with initialize_config_dir(str(config_dir()), job_name="starting", version_base="1.3"):
            compose_with = partial(hydra_compose, name, return_hydra_config=with_hydra)
            _refuse_nulls(name, compose_with, arguments)
            config = compose_with(arguments)
            _refuse_misfits(config, compose_with, arguments, folders)
            return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, name, overrides, extra_dirs)) from error


def compose_run(
    overrides: Sequence[str], extra_dirs: Iterable[Path] = ()
) -> tuple[dict[str, Any], Path, list[str]]:
    """Compose a single training run, of which Hydra says no more than its folder.

    Returns:
        Its config as plain containers, its folder, and the overrides that made the config.

    Raises:
        ConfigError: in one line.
    """
    config = compose("train", overrides, extra_dirs, with_hydra=True)
    try:
        folder, words = Path(config.hydra.run.dir), list(config.hydra.overrides.task)
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"hydra.run.dir: {reason}") from error
    with open_dict(config):
        del config["hydra"]
    return to_container(config), folder, words


def hydra_folder(name: str, overrides: Sequence[str], extra_dirs: Iterable[Path] = ()) -> Path:
    """Return the folder of a run or a sweep, `hydra.run.dir` or `hydra.sweep.dir`.

    Args:
        name: run or sweep.
        overrides: of the command; of those that sweep, the first choice.
        extra_dirs: folders of further configs.
    """
    config = compose("train", sweep(overrides)[0], extra_dirs, with_hydra=True)
    try:
        return Path(config.hydra[name].dir)
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"hydra.{name}.dir: {reason}") from error


def is_plain(overrides: Sequence[str], extra_dirs: Iterable[Path] = ()) -> bool:
    """Return whether a run asks Hydra for no more than its folder: no launcher, log or callback."""
    others = [o for o in overrides if not o.startswith("hydra.run.dir=")]
    asked = any(o.lstrip("+~").startswith(("hydra.", "hydra/")) for o in others)
    return not asked and "hydra" not in _written([*user_config_dirs(), *extra_dirs])


def _written(folders: Iterable[Path]) -> str:
    """Return all configs of some folders and their groups, as text."""
    depths = ("*.yaml", "*/*.yaml", "*/*/*.yaml")  # not all: a folder may hold data as well
    files = [path for folder in folders for depth in depths for path in folder.glob(depth)]
    return "\n".join(path.read_text(errors="replace") for path in files)


def _refuse_misfits(
    config: DictConfig,
    compose_with: Callable[[list[str]], DictConfig],
    overrides: list[str],
    extra_dirs: Iterable[Path],
) -> None:
    """Raise if an override sets a key to a value of another kind, before a library does.

    Checked are numbers and flags anywhere, and lists and groups of keys on the top level. Which
    kind a key has shows without the overrides; that is composed only if some config has another
    kind under this name.
    """
    misfits = {
        key: override
        for override in overrides
        if (key := override.partition("=")[0]).replace(".", "").isidentifier()
        and not key.startswith("hydra.")
        and ("." in key or not options(key))
        and (
            isinstance(now := OmegaConf.select(config, key, throw_on_missing=False), str)
            or ("." not in key and isinstance(now, (bool, int, float)))
        )
    }
    if not misfits:
        return
    written = _written([config_dir(), *extra_dirs])
    misfits = {
        key: override
        for key, override in misfits.items()
        if _is_group(key, written)
        or (isinstance(OmegaConf.select(config, key), str) and _is_number(key, written))
    }
    if not misfits:
        return
    before = compose_with([o for o in overrides if o.partition("=")[0] not in misfits])
    for key, override in misfits.items():
        own, now = (OmegaConf.select(c, key, throw_on_missing=False) for c in (before, config))
        number = isinstance(own, (bool, int, float)) and isinstance(now, str)
        if number and not _is_word_of(key, now, written):
            what = "true or false" if isinstance(own, bool) else "a number"
            raise ConfigError(f"{override}: expected {what}, for example {key}={as_written(own)}")
        if "." not in key and isinstance(own, (DictConfig, ListConfig)):
            raise ConfigError(f"{override}: {_wanted(key, own)}")


def _is_number(key: str, written: str) -> bool:
    """Return whether configs hold a number, a flag or a reference by the last part of a key."""
    name = re.escape(key.rpartition(".")[2])
    value = r"[-+]?\.?(\d|inf|nan)|(true|false|yes|no|on|off)\b|\$"
    return bool(re.search(rf"\b{name}:\s*({value})", written, re.IGNORECASE))


def _is_word_of(key: str, word: str, written: str) -> bool:
    """Return whether some config holds this very word by the last part of a key."""
    name = re.escape(key.rpartition(".")[2])
    return bool(re.search(rf"\b{name}:\s*{re.escape(word)}\s*($|#)", written, re.MULTILINE))


def _is_group(key: str, written: str) -> bool:
    """Return whether configs hold a list or a group of keys by a key of the top level."""
    return bool(re.search(rf"^{re.escape(key)}:\s*($|#|\[|\{{)", written, re.MULTILINE))


def _refuse_nulls(
    name: str, compose_with: Callable[[list[str]], DictConfig], overrides: list[str]
) -> None:
    """Raise if an override sets a top level key to null that needs a value."""
    written = (config_dir() / f"{name}.yaml").read_text()
    nulls = {
        key: o
        for o in overrides
        if (key := _set_to_null(o))
        and key.isidentifier()
        and key not in _NULL_FOR_NONE
        and not re.search(rf"^{key}: null\b", written, re.MULTILINE)
    }
    if not nulls:
        return
    before = compose_with([o for o in overrides if o not in nulls.values()])
    for key, override in nulls.items():
        own = before.get(key)
        if own is not None or options(key):
            raise ConfigError(f"{override}: {_wanted(key, own)}")


def _set_to_null(override: str) -> str:
    """Return the key that an override sets to null, or "" if it does something else."""
    key, _, value = override.partition("=")
    return key if value.strip().lower() == "null" else ""


def _wanted(key: str, own: Any) -> str:
    """Say which values a top level key takes, whose present value is `own`."""
    if (choices := options(key)) and isinstance(own, DictConfig | None):
        return f"null is not allowed; choose one of {', '.join(choices)}"
    if isinstance(own, DictConfig):
        return f"{key} is a group of keys; set {' or '.join(f'{key}.{part}' for part in own)}"
    if isinstance(own, ListConfig):
        return f"expected a list, for example {key}={list(own)}"
    return f"null is not allowed; for example {key}={as_written(own)}"


def _explain(
    error: Exception, name: str, overrides: Sequence[str], extra_dirs: Iterable[Path]
) -> str:
    text = " ".join(str(error).split())
    if "submitit_slurm" in text:
        return "hydra/launcher=submitit: not installed; pip install 'vistok[slurm]'"
    if (match := re.search(r"Could not override '([\w/]+)'", text)) and match[1] in groups(
        extra_dirs
    ):
        outer, _, part = match[1].rpartition("/")
        if outer:
            return f"{match[1]}: the {outer} that was chosen has no {part}; choose one that has"
    if match := re.search(r"Could not (?:find|override|load) '?([\w/]+)/([\w.-]+)'?", text):
        group, choice = match.groups()
        known = options(group, extra_dirs)
        if known and choice not in known:
            return (
                f"{group}={choice}: no such config{nearest(choice, known)}; "
                f"choose one of {', '.join(known)}"
            )
    if match := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return (
            f"{match[1]}: several values; --multirun makes one run for each, and key=[a,b] is a "
            "list"
        )
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if f"'{key}'" in text or f"'{override}'" in text or f" {key}" in text:
            if "not in struct" in text or "Could not override" in text or "Key" in text:
                chosen = [o for o in overrides if o.partition("=")[0] in groups(extra_dirs)]
                known = all_keys(compose(name, chosen, extra_dirs)) if overrides else []
                if key not in known:
                    return f"{key}: no such key{nearest_key(key, known)}"
            return f"{override}: {text[:160]}"
    return text[:240]


def all_keys(config: Any, prefix: str = "") -> list[str]:
    """Return all dotted keys of a config, without resolving anything."""
    keys = []
    for key in config:
        dotted = f"{prefix}{key}"
        keys.append(dotted)
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if isinstance(config[key], DictConfig):
            keys += all_keys(config[key], dotted + ".")
    return keys


def nearest_key(key: str, known: list[str]) -> str:
    """Return the closest dotted key, by its last part if that names one key, else as a whole."""
    same_leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    if len(same_leaf) == 1:
        return f" (did you mean '{same_leaf[0]}'?)"
    return nearest(key, known)


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Set `key=value` pairs in an already resolved config (a resumed run's own).

    Raises:
        ConfigError: for a key that it does not have, or a group choice.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text}: expected key=value") from error
        key = override.key_or_group
        missing = object()
        try:
            present = OmegaConf.select(config, key, default=missing, throw_on_missing=False)
        except OmegaConfBaseException:
            present = missing
        if present is missing and key in groups():
            raise ConfigError(f"{text}: a resumed run keeps its own {key}; start a new run instead")
        if present is missing and not override.is_add():
            raise ConfigError(f"{key}: no such key{nearest_key(key, all_keys(config))}")
        refused = "." not in key and key not in _NULL_FOR_NONE
        if _set_to_null(text) and refused and present not in (missing, None):
            raise ConfigError(f"{text}: {_wanted(key, present)}")
        if isinstance(present, DictConfig) and isinstance(override.value(), str):
            raise ConfigError(f"{text}: a resumed run keeps its own {key}; start a new run instead")
        with open_dict(config):
            OmegaConf.update(config, key, override.value(), merge=True)
    return config


def load_run_config(run: Path) -> DictConfig:
    """Return the resolved config that a run folder keeps.

    Raises:
        CheckpointError: if there is no such run, or its config is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        what = "has no config.yaml" if run.is_dir() else "no such run"
        raise CheckpointError(f"{run}: {what}{what_is_there(run)}")
    return OmegaConf.create(read_yaml(path))


def closed(container: dict[str, Any]) -> DictConfig:
    """Return a config of plain containers that takes overrides of the keys it has."""
    config = OmegaConf.create(container)
    OmegaConf.set_struct(config, True)
    return config


def to_container(config: DictConfig) -> dict[str, Any]:
    """Resolve all interpolations to plain containers.

    Raises:
        ConfigError: naming the key that cannot be resolved or was left out.
    """
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{key}: {' '.join(str(error).split())[:200]}") from error
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]
