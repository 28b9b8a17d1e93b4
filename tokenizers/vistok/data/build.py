"""The DataModule of a config."""

from __future__ import annotations

from typing import Any

from vistok.core.errors import ConfigError, nearest
from vistok.core.signatures import arguments_of
from vistok.data.datamodule import VistokDataModule


def build_data(options: dict[str, Any]) -> VistokDataModule:
    """Return the images of a config's `data`.

    Raises:
        ConfigError: naming a key that is wrong.
    """
    rules = arguments_of(VistokDataModule).rules
    for name, value in options.items():
        if name not in rules:
            raise ConfigError(f"data.{name}: no such key{nearest(str(name), rules)}")
        rule = rules[name]
        if rule is not None and not rule.test(value):
            raise ConfigError(rule.complaint(f"data.{name}", value))
    return VistokDataModule(**options)
