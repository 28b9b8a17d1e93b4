"""A tokenizer from a run's config, and its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.core.errors import ConfigError, as_written
from vistok.core.registry import build, check_arguments, resolve
from vistok.core.values import Count, check
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.base import Quantizer

#: What the keys of a tokenizer's config hold, each in the words of an error.
_CONTRACTS: dict[str, tuple[str, type]] = {
    "tokenizer": ("a tokenizer", Tokenizer),
    "encoder": ("an encoder", Encoder),
    "decoder": ("a decoder", Decoder),
    "quantizer": ("a quantizer", Quantizer),
}

#: Widths that a config takes from `tokenizer.latent_dim`, or from the width of what they meet.
_FOLLOWING = ("dim", "latent_dim")


def build_tokenizer(config: Mapping[str, Any], teachers: bool = True) -> Tokenizer:
    """A tokenizer from the `tokenizer` and `quantizer` parts of a resolved config.

    Args:
        config: of a run or an export.
        teachers: build what parts have as their `teacher`, which only training needs; without,
            they are given None.
    """
    if not teachers:
        config = {**config, "tokenizer": _without_teachers(config["tokenizer"])}
    ends = config["tokenizer"] if isinstance(config["tokenizer"], Mapping) else {}
    described = {key: config[key] for key in ("tokenizer", "quantizer")}
    described |= {f"tokenizer.{key}": ends[key] for key in ("encoder", "decoder") if key in ends}
    for key, part in described.items():
        if not isinstance(part, Mapping):
            raise ConfigError(f"{key}={as_written(part)}: expected a mapping with a _target_")
        _check_contract(key, part.get("_target_"))
    parts = {key: value for key, value in config["tokenizer"].items() if key != "latent_dim"}
    # First what others follow from in the configs: latent_dim itself may follow from a width.
    check_arguments(parts, "tokenizer", {"quantizer"}, but=_FOLLOWING)
    check("tokenizer.latent_dim", config["tokenizer"].get("latent_dim", 1), Count)
    quantizer = build(config["quantizer"], "quantizer")
    return build(parts, "tokenizer", quantizer=quantizer)


def _without_teachers(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {k: None if k == "teacher" else _without_teachers(v) for k, v in config.items()}


def _check_contract(key: str, target: Any) -> None:
    """Refuse a name of something else, such as a quantizer for a tokenizer."""
    cls = resolve(target, key=f"{key}._target_")
    expected, contract = _CONTRACTS[key.rpartition(".")[2]]
    if not issubclass(cls, contract):
        found = (words for words, other in _CONTRACTS.values() if issubclass(cls, other))
        what = next(found, f"the class {cls.__name__}")
        raise ConfigError(f"{key}._target_={target}: is {what}, expected {expected}")


def starts_from_data(config: Mapping[str, Any]) -> bool:
    """Return whether a run's fresh weights are set from training images.

    With `init=random` they stay as they are constructed.

    Args:
        config: resolved; runs from before the key existed all start from data.

    Raises:
        ConfigError: if `init` is another word.
    """
    init = config.get("init", "data")
    if init not in ("data", "random"):
        raise ConfigError(f"init={as_written(init)}: must be data or random")
    return init == "data"
