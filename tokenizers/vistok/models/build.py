"""A tokenizer from a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.core.errors import ConfigError, as_written
from vistok.core.registry import _FOLLOWING, _check_arguments, build
from vistok.core.values import check_whole
from vistok.models.tokenizer import Tokenizer


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from the `tokenizer` and `quantizer` parts of a resolved config."""
    ends = config["tokenizer"] if isinstance(config["tokenizer"], Mapping) else {}
    described = {key: config[key] for key in ("tokenizer", "quantizer")}
    described |= {f"tokenizer.{key}": ends[key] for key in ("encoder", "decoder") if key in ends}
    for key, part in described.items():
        if not isinstance(part, Mapping):
            raise ConfigError(f"{key}={as_written(part)}: expected a mapping with a _target_")
    parts = {key: value for key, value in config["tokenizer"].items() if key != "latent_dim"}
    # First what others follow from in the configs: latent_dim itself may follow from a width.
    _check_arguments(parts, "tokenizer", but=_FOLLOWING)
    check_whole("tokenizer.latent_dim", config["tokenizer"].get("latent_dim", 1), 1)
    quantizer = build(config["quantizer"], "quantizer")
    tokenizer = build(parts, "tokenizer", quantizer=quantizer)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"tokenizer._target_={parts.get('_target_')}: not a Tokenizer")
    return tokenizer
