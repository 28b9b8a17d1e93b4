"""Metrics from a table of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.core.errors import ConfigError, as_written
from vistok.core.registry import build
from vistok.metrics.image import ImageMetric
from vistok.nn.network import Network


def build_metrics(table: Mapping[str, Any], key: str = "metrics") -> dict[str, ImageMetric]:
    """Return metrics by name.

    Those whose `network` is described alike get one network, which looks at each batch once.

    Args:
        table: name to `_target_` and the metric's own arguments; null for one that is not wanted.
        key: where it lies in the config, for messages.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    networks: list[tuple[Any, Any]] = []
    metrics: dict[str, ImageMetric] = {}
    for name, options in table.items():
        if options is None:
            continue
        here = f"{key}.{name}"
        if not isinstance(options, Mapping) or "_target_" not in options:
            raise ConfigError(f"{here}={as_written(options)}: expected a mapping with a _target_")
        options, given = dict(options), {}
        if isinstance(options.get("network"), Mapping):
            described = options.pop("network")
            found = [network for other, network in networks if other == described]
            if not found:
                found = [build(described, f"{here}.network")]
                networks.append((described, found[0]))
                if not isinstance(found[0], Network):
                    target = described.get("_target_")
                    raise ConfigError(f"{here}.network={target}: must be a part of class Network")
            given["network"] = found[0]
        metrics[name] = build(options, here, "metric", **given)
    return metrics
