"""Line charts as pictures, drawn by matplotlib without its global state (pyplot)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from vistok.core.files import replacing

_COLORS = ("#1f5fb4", "#d1602b", "#2e8b57", "#8a4fb0", "#7a7a7a")

_MARKERS = "osD^v"


@dataclass(frozen=True)
class Series:
    """A named line through points; x must be positive."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A chart: the x axis is logarithmic to the base 2, the y axis linear."""

    x_label: str
    y_label: str
    series: Sequence[Series]


def figure_of(panels: Sequence[Panel]) -> Figure:
    """Return the panels side by side, each with a legend of its series."""
    figure = Figure(figsize=(5.2 * len(panels), 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        for number, series in enumerate(panel.series):
            color = _COLORS[number % len(_COLORS)]
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(series.x, series.y, marker, ls="-", color=color, ms=5, label=series.name)
        axes.set_xscale("log", base=2)
        axes.set_xlim(*whole_octaves([x for series in panel.series for x in series.x]))
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=11))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def whole_octaves(values: Sequence[float]) -> tuple[float, float]:
    """Return limits that lie a little outside of the powers of two around `values`."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return 2 ** (low - 0.3), 2 ** (high + 0.3)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure_of(panels).savefig(file, format="png")
