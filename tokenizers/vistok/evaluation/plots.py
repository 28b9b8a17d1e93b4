"""Charts as pictures, drawn by matplotlib without its global state (pyplot)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import offset_copy

from vistok.core.files import replacing

_COLORS = ("#1f5fb4", "#d1602b", "#2e8b57", "#8a4fb0", "#7a7a7a")

_MARKERS = "osD^v"


@dataclass(frozen=True)
class Series:
    """A named line through points.

    Attributes:
        name: for the legend.
        x: positive where the axis is logarithmic.
        y: as many.
        color: number of its color; None counts through.
        dashed: for a line that belongs to another one of its color.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A chart of lines.

    Attributes:
        x_label: below it.
        y_label: next to it.
        series: its lines.
        x_scale: "octaves" (logarithmic to the base 2), "log" (to the base 10) or "linear".
        y_scale: "linear" or "log".
        markers: show the points.
    """

    x_label: str
    y_label: str
    series: Sequence[Series]
    x_scale: str = "octaves"
    y_scale: str = "linear"
    markers: bool = True


def figure_of(panels: Sequence[Panel]) -> Figure:
    """Return the panels side by side, each with a legend of its series."""
    figure = Figure(figsize=(5.2 * len(panels), 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        _draw_panel(axes, panel, "#e4e4e4")
    return figure


def _draw_panel(axes: Axes, panel: Panel, grid_color: str) -> None:
    for number, series in enumerate(panel.series):
        color = number if series.color is None else series.color
        marker = _MARKERS[color % len(_MARKERS)] if panel.markers else ""
        color = _COLORS[color % len(_COLORS)]
        style = "--" if series.dashed else "-"
        axes.plot(series.x, series.y, marker=marker, ls=style, color=color, ms=5, label=series.name)
    if panel.x_scale == "octaves":
        axes.set_xscale("log", base=2)
        axes.set_xlim(*whole_octaves([x for series in panel.series for x in series.x]))
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=11))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif panel.x_scale == "log":
        axes.set_xscale("log")
    axes.set_yscale(panel.y_scale)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color=grid_color)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if _legend_rows(panel):  # codecs both ways: a legend among so many lines hides some
        below = offset_copy(axes.transAxes, axes.get_figure(root=True), y=-0.42)
        axes.legend(
            frameon=False,
            fontsize="small",
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.45, 0),
            bbox_transform=below,
        )
    elif len(panel.series) > 1 or panel.x_scale == "octaves":
        axes.legend(frameon=False)


def _legend_rows(panel: Panel) -> int:
    """Return the rows of a legend below the axes; 0 for few lines, whose legend lies in them."""
    return math.ceil(len(panel.series) / 2) if len(panel.series) > 4 else 0


#: Stands for the color of a page's text while matplotlib draws; then it is that color.
_INK = "#010203"


def svg(panel: Panel, width: float = 5.2, height: float = 3.4) -> str:
    """Return a chart as an SVG element for a page, in the color of the page's text.

    Text stays text, in the page's font; nothing is random, so equal charts are equal strings.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vistok",
        "font.family": "sans-serif",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(settings):
        below = 0.2 * _legend_rows(panel)
        whole = height + below
        figure = Figure(figsize=(width, whole))
        bottom, top = (0.16 * height + below) / whole, 1 - 0.03 * height / whole
        figure.subplots_adjust(left=0.14, right=0.98, bottom=bottom, top=top)
        FigureCanvasSVG(figure)
        _draw_panel(figure.subplots(), panel, "#80808040")
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    for useless in (r"<metadata>.*?</metadata>", r"<style.*?</style>"):
        text = re.sub(useless, "", text, flags=re.S)
    # The page says how wide it is, and the height follows.
    head, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def heat(values: np.ndarray) -> np.ndarray:
    """Return maps `(..., H, W)`, 0 to their common largest value, as colors `(..., H, W, 3)`."""
    top = float(values.max()) or 1.0
    return (colormaps["magma"](values / top)[..., :3] * 255).round().astype(np.uint8)


def whole_octaves(values: Sequence[float]) -> tuple[float, float]:
    """Return limits that lie a little outside of the powers of two around `values`."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return 2 ** (low - 0.3), 2 ** (high + 0.3)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure_of(panels).savefig(file, format="png")
