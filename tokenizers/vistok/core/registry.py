"""Names of parts, and parts built from configs. Only registered classes are ever built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from vistok.core.errors import ArgumentError, ConfigError, as_written, nearest
from vistok.core.values import is_number, is_whole

_LAYERS = ("quantizers", "models", "losses", "systems")

_registered: dict[str, type[nn.Module]] = {}

#: Arguments that count or measure something, whatever part has them: the least of them is 1.
_COUNTS = {
    "base_channels",
    "causal_depth",
    "channel_multipliers",
    "channels",
    "code_dim",
    "depth",
    "dim",
    "image_size",
    "latent_dim",
    "num_codes",
    "num_heads",
    "num_holistic_tokens",
    "num_latent_tokens",
    "num_res_blocks",
    "num_text_tokens",
    "patch_size",
    "stem",
    "text_dim",
    "width",
}

#: Widths that a config takes from `tokenizer.latent_dim`, or from the width of what they meet.
_FOLLOWING = ("dim", "latent_dim")

#: What the annotation of an argument asks for: in words, and whether a value is that.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", is_whole),
    "float": ("a number", is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "Sequence[int]": (
        "a list of whole numbers",
        lambda value: isinstance(value, (list, tuple)) and all(map(is_whole, value)),
    ),
    "None": ("null", lambda value: value is None),
}


def register(cls: Any) -> Any:
    """Let configs name a class."""
    if isinstance(cls, str):

        def under(decorated: Any) -> Any:
            _registered[cls] = decorated
            return register(decorated)

        return under
    _registered[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def resolve(target: str) -> type[nn.Module]:
    """The class that a config's `_target_` names.

    Raises:
        ConfigError: unless it is a module class of vistok's layers, or a registered one.
    """
    target = str(target)
    if target not in _registered and "." not in target:
        import pkgutil

        for floor in ("losses", "systems", "models", "quantizers"):
            package = importlib.import_module(f"vistok.{floor}")
            for info in pkgutil.walk_packages(package.__path__, f"vistok.{floor}."):
                importlib.import_module(info.name)
    if target in _registered:
        return _registered[target]
    module_name, _, class_name = target.rpartition(".")
    parts = module_name.split(".")
    if len(parts) < 3 or parts[0] != "vistok" or parts[1] not in _LAYERS:
        raise ConfigError(
            f"_target_={target}: not a class of vistok's registry "
            f"(vistok.{{{','.join(_LAYERS)}}}.*, or registered with vistok.register)"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"_target_={target}: there is no module {module_name}") from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module_name):
        known = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module_name
        ]
        raise ConfigError(
            f"_target_={target}: {module_name} defines no such module class"
            f"{nearest(class_name, known)}"
        )
    return cls


def build(config: Any, key: str = "", /, **given: Any) -> Any:
    """Build the object that a config of plain containers describes.

    Args:
        config: a mapping with `_target_` and constructor arguments; nested mappings with a
            `_target_` and lists are built first, everything else is passed as it is.
        key: where it lies in the run's config, for messages.
        given: further constructor arguments.

    Raises:
        ConfigError: naming the class or the key that is wrong.
    """
    _check_arguments(config, key)
    return _build(config, key, given)


def _build(config: Any, key: str, given: Mapping[str, Any]) -> Any:
    if isinstance(config, Mapping):
        values = {k: _build(v, _inner(key, k), {}) for k, v in config.items() if k != "_target_"}
        if "_target_" not in config:
            return values
        cls = resolve(config["_target_"])
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


def _check_arguments(config: Any, key: str, but: Collection[str] = ()) -> None:
    """Refuse numbers that the annotation of an argument excludes, and counts below 1.

    Args:
        config: as for `build`.
        key: where it lies in the run's config.
        but: names of arguments to leave unchecked.
    """
    if isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            _check_arguments(value, f"{key}[{i}]", but)
    if not isinstance(config, Mapping):
        return
    target = config.get("_target_")
    parameters = inspect.signature(resolve(target)).parameters if target else {}
    for name, value in config.items():
        _check_arguments(value, _inner(key, name), but)
        if name in but:
            continue
        annotation = parameters[name].annotation if name in parameters else ""
        if not isinstance(annotation, str):
            annotation = inspect.formatannotation(annotation)
        names = annotation.split(" | ")
        if not _KINDS.keys() >= set(names):
            continue  # a part, a choice of words, ...
        kinds = [_KINDS[kind] for kind in names]
        right, least = any(fits(value) for _, fits in kinds), ""
        if name in _COUNTS:
            numbers = value if isinstance(value, (list, tuple)) else [value]
            right = right and bool(numbers) and all(n is None or n >= 1 for n in numbers)
            least = ", 1 or more"
        if not right:
            wanted = " or ".join(words for words, _ in kinds) + least
            raise ConfigError(f"{_inner(key, name)}={as_written(value)}: must be {wanted}")
