"""The metrics of an evaluation, built from its config."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vistok.core.errors import ConfigError, VistokError
from vistok.metrics.build import build_metrics
from vistok.metrics.image import ImageMetric, most_scales


@dataclass
class Suite:
    """Metrics for each number of tokens, which share their networks.

    Attributes:
        sets: metrics by name, by number of tokens.
        left_out: a line for each metric that cannot be measured here.
    """

    sets: dict[int, dict[str, ImageMetric]]
    left_out: list[str] = field(default_factory=list)


def build_suite(
    settings: Mapping[str, Any],
    budgets: Sequence[int],
    channels: int,
    sizes: Sequence[tuple[int, int]],
    device: torch.device | str = "cpu",
) -> Suite:
    """Return the metrics of `eval.metrics`, a set of them for each number of tokens.

    An entry may name the Python `packages` that its network's weights come with, the `extra` of
    vistok that installs them, and `scales: auto` for as many scales as the images allow.

    Args:
        settings: the group `eval`: `metrics`, and `missing`, which says what becomes of a metric
            whose package is not installed or that does not take these images: "error" or
            "leave_out".
        budgets: numbers of tokens.
        channels: of the images.
        sizes: all heights and widths of the images.
        device: of networks and sums.

    Raises:
        ConfigError: naming the key that is wrong, or the metric that cannot be measured.
    """
    if settings["missing"] not in ("error", "leave_out"):
        raise ConfigError(f"eval.missing={settings['missing']}: must be error or leave_out")
    lenient = settings["missing"] == "leave_out"
    suite = Suite({})
    smallest = min((min(size) for size in sizes), default=0)
    table: dict[str, Any] = {}
    for name, options in settings["metrics"].items():
        options = dict(options) if isinstance(options, Mapping) else options
        problem = None
        if isinstance(options, dict):
            packages, extra = options.pop("packages", ()), options.pop("extra", None)
            missing = [name for name in packages if importlib.util.find_spec(name) is None]
            if missing:
                names = " ".join(name.replace("_", "-") for name in missing)
                names = f"'vistok[{extra}]'" if extra else names
                problem = f"its network needs pip install {names}"
            if options.get("scales") == "auto":
                options["scales"] = most_scales(smallest)
                if not options["scales"]:
                    problem = f"images of {smallest} px are too small for it"
        if problem is None:
            table[name] = options
        elif lenient:
            suite.left_out.append(f"{name} is left out: {problem}")
        else:
            raise ConfigError(f"eval.metrics.{name}: {problem}")
    # One table, so that networks are shared, and look at the originals once.
    everything = {f"{name}@{k}": options for k in budgets for name, options in table.items()}
    try:
        built = build_metrics(everything, "eval.metrics")
    except VistokError as error:
        raise type(error)(_in_words_of_eval(str(error), settings, budgets)) from error
    for k in budgets:
        own = {name: built[f"{name}@{k}"] for name in table if f"{name}@{k}" in built}
        suite.sets[k] = {name: metric.to(device) for name, metric in own.items()}
    for name, metric in list(suite.sets[budgets[-1]].items()):
        problem = _misfit(metric, channels, sizes)
        if problem is None:
            continue
        if not lenient:
            raise ConfigError(f"eval.metrics.{name}: {problem}")
        suite.left_out.append(f"{name} is left out: {problem}")
        for own in suite.sets.values():
            del own[name]
    return suite


def _in_words_of_eval(text: str, settings: Mapping[str, Any], budgets: Sequence[int]) -> str:
    """Return an error with the keys that people type: no number of tokens, `eval.vgg=FILE`."""
    for k in budgets:
        text = text.replace(f"@{k}", "", 1)
    start, remedy, _ = text.partition("or set weights to a file")
    for key, what in (("vgg", "VGG16"), ("alex", "AlexNet"), ("inception", "Inception")):
        if remedy and key in settings and f"{what} is not at hand" in start:
            return f"{start}or set eval.{key}=FILE"
    return text


def _misfit(metric: ImageMetric, channels: int, sizes: Sequence[tuple[int, int]]) -> str | None:
    """Return why a metric's network does not take such images, or None."""
    held = getattr(metric, "network", None)
    if held is None:
        return None
    for size in sizes:
        try:
            held.module.check(channels, size)
        except VistokError as error:
            return str(error)
    return None
