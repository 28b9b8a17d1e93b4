"""Names of parts, and parts built from configs. Only registered classes are ever built."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, overload

from vistok.core.errors import ArgumentError, ConfigError, as_written, nearest
from vistok.core.signatures import Arguments, arguments_of

T = TypeVar("T", bound=Callable[..., Any])

#: Kinds of registered things, each with names of its own; an error says them with their article.
_ARTICLES = {
    "part": "a part",
    "importer": "an importer",
    "exporter": "an exporter",
    "stage": "a stage",
    "task": "a task",
    "metric": "a metric",
}

#: Where things of a kind register themselves when their modules are imported: floors that need
#: torch alone, but for tasks.
_FLOORS: dict[str, Sequence[str]] = {
    **dict.fromkeys(_ARTICLES, ("quantizers", "models", "losses", "systems", "priors")),
    "task": ("tasks",),
    "metric": ("metrics",),
}

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in _ARTICLES}

#: Names by import path; code of one's own that was given no name has its path for a name.
_names: dict[str, dict[str, str]] = {kind: {} for kind in _ARTICLES}

_imported: set[str] = set()  # floors


@overload
def register(given: str, kind: str = "part") -> Callable[[T], T]: ...


@overload
def register(given: T) -> T: ...


def register(given: Any, kind: str = "part") -> Any:
    """Let configs name a class, or the command line a function; usable as a decorator.

    `@register("titok")` gives a short name. `@register` alone is for a class of your own, which
    configs then name by its import path; a config never causes an import outside vistok.

    Args:
        given: a name, or the class itself.
        kind: "part" for the classes that a config builds, "importer" for functions that convert
            released weights, "exporter" for those that do the reverse, "stage", "task" or "metric".
            Each kind has names of its own.

    Raises:
        ConfigError: if the name is taken, or the class has another one.
    """
    if not isinstance(given, str):
        return _add(given, _path(given), kind)
    if not given.isidentifier():
        raise ConfigError(f"register: {given!r} must be a name, of letters, digits and underscores")
    return lambda item: _add(item, given, kind)


def _path(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


def _add(item: Any, name: str, kind: str) -> Any:
    items, names, path = _registered[kind], _names[kind], _path(item)
    if kind == "part" and not isinstance(item, type):
        raise ConfigError(f"register: {path} must be a class; configs build nothing else")
    if name in items and _path(items[name]) != path:
        raise ConfigError(
            f"register: '{name}' is {_path(items[name])} already; choose another name for {path}"
        )
    before = names.get(path, name)
    if before != name:
        if items[before] is item:
            raise ConfigError(f"register: {path} has the name '{before}' already")
        del items[before]  # defined anew under another name, as happens in a notebook
    items[name], names[path] = item, name
    return item


def registered(kind: str = "part") -> dict[str, Any]:
    """Return everything of a kind by name, in the order of the names."""
    _discover(kind)
    return dict(sorted(_registered[kind].items()))


def _discover(kind: str) -> None:
    """Import every module that may register something of a kind, once."""
    for floor in _FLOORS[kind]:
        if floor not in _imported:
            package = importlib.import_module(f"vistok.{floor}")
            for module in pkgutil.walk_packages(package.__path__, f"vistok.{floor}."):
                importlib.import_module(module.name)
            _imported.add(floor)


def resolve(target: Any, kind: str = "part", key: str = "_target_") -> Any:
    """Return what a name stands for, or the import path of something registered.

    Args:
        target: such as "titok", or "vistok.systems.titok.model.TiTok".
        kind: see `register`.
        key: what named it, for messages.

    Raises:
        ConfigError: if nothing of that kind has the name; it gives the nearest one.
    """
    if (found := _find(target, kind)) is None:
        _discover(kind)
        found = _find(target, kind)
    if found is None:
        raise ConfigError(f"{key}={as_written(target)}: {_unknown(str(target), kind)}")
    return found


def _find(target: Any, kind: str) -> Any:
    if not isinstance(target, str):
        return None
    return _registered[kind].get(_names[kind].get(target, target))


def _unknown(target: str, kind: str) -> str:
    for other, article in _ARTICLES.items():
        if _find(target, other) is not None:
            return f"is {article}, expected {_ARTICLES[kind]}"
    items = _registered[kind]
    if kind != "part":
        return f"no such {kind}{nearest(target, items)}; there are: {', '.join(sorted(items))}"
    same = {path.rpartition(".")[2]: name for path, name in _names[kind].items()}
    if name := same.get(target.rpartition(".")[2]):  # its class has moved
        hint = f" (did you mean '{name}'?)"
    else:
        hint = nearest(target, _names[kind] if "." in target else items)
    own = "if it is your own, import its module first (plugins=[...])"
    return f"not in vistok's registry{hint}; {own}"


def name_of(item: Any, kind: str = "part") -> str:
    """Return the registered name of a class, or of the nearest one that it derives from."""
    for each in item.__mro__:
        if name := _names[kind].get(_path(each)):
            return name
    return item.__name__


def with_names(config: Any) -> Any:
    """Return a config in which the paths of registered classes are replaced by their names."""
    _discover("part")
    if isinstance(config, Mapping):
        named = {key: with_names(value) for key, value in config.items()}
        if isinstance(target := named.get("_target_"), str):
            named["_target_"] = _names["part"].get(target, target)
        return named
    if isinstance(config, (list, tuple)):
        return [with_names(value) for value in config]
    return config


def build(config: Any, key: str = "", kind: str = "part", /, **given: Any) -> Any:
    """Build the object that a config of plain containers describes.

    Args:
        config: a mapping with `_target_` and constructor arguments; nested mappings with a
            `_target_` and lists are built first, everything else is passed as it is.
        key: where it lies in the run's config, for messages.
        kind: of the object itself; what it holds are parts.
        given: further constructor arguments.

    Raises:
        ConfigError: naming the class or the key that is wrong.
    """
    check_arguments(config, key, given, kind=kind)
    return _build(config, key, given, kind)


def _build(config: Any, key: str, given: Mapping[str, Any], kind: str = "part") -> Any:
    if isinstance(config, Mapping):
        values = {k: _build(v, _inner(key, k), {}) for k, v in config.items() if k != "_target_"}
        if "_target_" not in config:
            return values
        cls = resolve(config["_target_"], kind, key=_inner(key, "_target_"))
        try:
            return cls(**values, **given)
        except ArgumentError as error:
            raise ConfigError(_inner(key, str(error))) from error
        except TypeError as error:
            raise ConfigError(f"{config['_target_']}: {error}") from error
    if isinstance(config, (list, tuple)):
        return [_build(value, f"{key}[{i}]", {}) for i, value in enumerate(config)]
    return config


def _inner(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def check_arguments(
    config: Any,
    key: str = "",
    given: Collection[str] = (),
    but: Collection[str] = (),
    kind: str = "part",
) -> None:
    """Hold a config to the annotations of the constructors that it names.

    Args:
        config: as for `build`.
        key: where it lies in the run's config.
        given: names of arguments that the outermost part gets besides.
        but: names of arguments to pass over, wherever they are.
        kind: of the outermost; what it holds are parts.

    Raises:
        ConfigError: naming the full key of an argument that is wrong, missing, or not one.
    """
    if isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            check_arguments(value, f"{key}[{i}]", but=but)
    elif isinstance(config, Mapping) and "_target_" in config:
        cls = resolve(config["_target_"], kind, key=_inner(key, "_target_"))
        values = {name: value for name, value in config.items() if name != "_target_"}
        _check(values, arguments_of(cls), key, config["_target_"], given, but)
    elif isinstance(config, Mapping):
        for name, value in config.items():
            check_arguments(value, _inner(key, name), but=but)


def _check(
    values: Mapping[str, Any],
    arguments: Arguments,
    key: str,
    owner: str,
    given: Collection[str],
    but: Collection[str],
) -> None:
    for name, value in values.items():
        here = _inner(key, name)
        if name in but:
            continue
        if name not in arguments.rules and not arguments.open:
            known = {*arguments.rules, *but} - set(given)
            raise ConfigError(f"{here}: no such argument of {owner}{nearest(name, known)}")
        rule = arguments.rules.get(name)
        if rule is not None and not rule.test(_unbuilt(value, here, resolve)):
            raise ConfigError(rule.complaint(here, _unbuilt(value, here, _written)))
        if name in arguments.groups and value is not None:
            _check(value, arguments.groups[name], here, here, (), but)
        check_arguments(value, here, but=but)
    for name in arguments.required:
        if name not in {*values, *given, *but}:
            rule = arguments.rules[name]
            needed = rule.words if rule else "it"
            raise ConfigError(f"{_inner(key, name)} is missing: {owner} needs {needed}")


def _unbuilt(value: Any, key: str, stand_in: Callable[..., Any]) -> Any:
    """Return a value, with something that stands in for each part that it describes."""
    if isinstance(value, Mapping) and "_target_" in value:
        return stand_in(value["_target_"], key=_inner(key, "_target_"))
    if isinstance(value, (list, tuple)):
        return [_unbuilt(item, f"{key}[{i}]", stand_in) for i, item in enumerate(value)]
    return value


def _written(target: str, key: str) -> str:
    return target
