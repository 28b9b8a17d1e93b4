"""Measure pairs of images: metrics over all of them, and the numbers of each one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import DataError, VistokError
from vistok.core.ranks import gather
from vistok.metrics.image import ImageMetric
from vistok.quantizers.usage import CodeUsage


class Measurement:
    """Accumulates metrics of reconstructions and the use of codes, at one number of tokens.

    Args:
        metrics: by the names that results have.
        usage: counts codes; None where there are no ids.
        num_tokens: how many of each image's tokens count; None for all.
        lenient: leave a metric out that these images do not suffice for.
        alone: this rank measures without the others.
    """

    def __init__(
        self,
        metrics: Mapping[str, ImageMetric],
        usage: CodeUsage | None = None,
        num_tokens: int | None = None,
        lenient: bool = False,
        alone: bool = False,
    ) -> None:
        self.metrics = dict(metrics)
        self.alone = alone
        self.lenient = lenient
        self.notes: list[str] = []  # what people should know, once it is computed
        # Of metrics that are means over images: float64 sums, and how many images they are of.
        self.sums: dict[str, tuple[float, int]] = {}
        self.usage = usage
        self.num_tokens = num_tokens

    @torch.no_grad()
    def update(
        self, originals: Tensor, reconstructions: Tensor, indices: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take in a batch.

        Args:
            originals: `(B, C, H, W)` uint8.
            reconstructions: likewise.
            indices: `(B, n, Q)` ids.

        Returns:
            The values `(B,)` of each metric that has one for each image, on the CPU.
        """
        if self.usage is not None and indices is not None:
            self.usage.update(indices[:, : self.num_tokens])
        values = {}
        # An autocast around us would reach into the metrics: SSIM is a convolution.
        with torch.autocast(originals.device.type, enabled=False):
            for name, metric in self.metrics.items():
                found = metric.per_image(originals, reconstructions)
                if found is None:
                    metric.update(originals, reconstructions)
                else:
                    values[name] = found.detach().double().cpu()
                    total, count = self.sums.get(name, (0.0, 0))
                    self.sums[name] = total + values[name].sum().item(), count + len(found)
        return values

    def compute(self) -> dict[str, float]:
        """Return plain numbers over all batches and ranks; every rank calls it, unless alone."""
        results: dict[str, float] = {}
        of_ranks = [self.sums] if self.alone else gather(self.sums)
        for name, metric in self.metrics.items():
            if means := [sums[name] for sums in of_ranks if name in sums]:
                count = sum(count for _, count in means)
                results[name] = sum(total for total, _ in means) / count if count else math.nan
                continue
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    metric.sync_on_compute = not self.alone
                    results.update(flat(name, metric.compute()))
                except DataError as error:
                    if not self.lenient:
                        raise
                    self.notes.append(f"{name} is left out: {error}")
            texts = [" ".join(str(w.message).split()) for w in warned]
            # A measurement that goes on where a kill ended it may have no batch left.
            self.notes += [t for t in texts if "was called before the" not in t]
        if self.usage is not None:
            results.update(flat("", self.usage.compute()))
        return results

    # ------------------------------------------------------------------ going on after a kill

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank has taken in: tensors and lists of them."""
        states = {name: copied(metric.metric_state) for name, metric in self.metrics.items()}
        counts = None if self.usage is None else self.usage.counts.cpu()
        return {"metrics": states, "sums": self.sums, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a measurement of the same metrics."""
        if state["metrics"].keys() != self.metrics.keys():
            raise VistokError("the state is of other metrics")
        for name, values in state["metrics"].items():
            metric = self.metrics[name]
            for key, value in values.items():
                own = getattr(metric, key)
                device = own.device if isinstance(own, Tensor) else metric.device
                setattr(metric, key, moved(value, device))
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        if self.usage is not None:
            self.usage.restore(state["counts"].to(self.usage.counts.device))


def flat(name: str, value: Any) -> dict[str, float]:
    """Return a metric's result as plain numbers; those of a dict by `name`, `_` and their parts."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {
            key: number
            for part, inner in value.items()
            for key, number in flat(_joined(name, part), inner).items()
        }
    if isinstance(value, Tensor):
        return {name: value.item()}
    return {name: value}


#: Parts of a result that are what the metric is named for.
_MAIN = ("distance", "score")


def _joined(name: str, part: str) -> str:
    if not name:
        return part
    return name if part in _MAIN else f"{name}_{part}"


def copied(value: Any) -> Any:
    """Return a copy of tensors, and lists and dicts of them, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(inner) for inner in value]
    return value


def moved(value: Any, device: torch.device) -> Any:
    """Return tensors, and lists of them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return [moved(inner, device) for inner in value] if isinstance(value, list) else value
