"""The metrics of an evaluation, built from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vistok.core.errors import ConfigError
from vistok.metrics.image import PSNR, SSIM, ImageMetric

_KNOWN = {"psnr": PSNR, "ssim": SSIM}


def build_metrics(
    table: Mapping[str, Any], device: torch.device | str = "cpu"
) -> dict[str, ImageMetric]:
    """Return the metrics of `eval.metrics`, by their names, on a device.

    Args:
        table: name to {_target_: a registered metric, its options}; null leaves a name out.
        device: of the networks and the sums.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    metrics: dict[str, ImageMetric] = {}
    for name, spec in table.items():
        if spec is None:
            continue
        key = f"eval.metrics.{name}"
        if not isinstance(spec, Mapping) or "_target_" not in spec:
            raise ConfigError(f"{key}: expected {{_target_: METRIC}}, or null for none")
        metrics[name] = _KNOWN[spec["_target_"]]().to(device)
    return metrics
