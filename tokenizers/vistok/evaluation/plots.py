"""Line charts, drawn with Pillow alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_COLORS = ("#1f5fb4", "#d1602b", "#2e8b57", "#8a4fb0", "#7a7a7a")

_WIDTH, _HEIGHT = 640, 460  # of a panel, in pixels

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 18, 54  # margins


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


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side as a PNG, whole or not at all."""
    picture = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    for number, panel in enumerate(panels):
        _draw_panel(pen, panel, number * _WIDTH)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, shift: int) -> None:
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    x_low, x_high = bounds([math.log2(x) for s in panel.series for x in s.x])
    y_low, y_high = bounds([y for s in panel.series for y in s.y])
    left, right = shift + _LEFT, shift + _WIDTH - _RIGHT
    top, bottom = _TOP, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (math.log2(x) - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    for exponent in range(math.ceil(x_low), math.floor(x_high) + 1):
        x, _ = place(2**exponent, y_low)
        pen.line((x, top, x, bottom), fill="#e4e4e4")
        pen.text((x, bottom + 6), f"{2**exponent:g}", fill="black", font=small, anchor="ma")
    for y in ticks(y_low, y_high):
        _, height = place(2**x_low, y)
        pen.line((left, height, right, height), fill="#e4e4e4")
        pen.text((left - 6, height), f"{y:g}", fill="black", font=small, anchor="rm")
    pen.rectangle((left, top, right, bottom), outline="#808080")
    pen.text(((left + right) / 2, _HEIGHT - 10), panel.x_label, "black", font, anchor="ms")
    pen.text((shift + 8, 2), panel.y_label, fill="black", font=small)
    for number, series in enumerate(panel.series):
        color = _COLORS[number % len(_COLORS)]
        points = [place(x, y) for x, y in zip(series.x, series.y, strict=True)]
        if len(points) > 1:
            pen.line(points, fill=color, width=2)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        line = top + 14 + 19 * number
        pen.line((left + 12, line, left + 34, line), fill=color, width=2)
        pen.text((left + 40, line), series.name, fill="black", font=small, anchor="lm")


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest value with a little room around them."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Five to ten round numbers between `low` and `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(step * m for m in (5, 2, 1) if (high - low) / (step * m) >= 5 or m == 1)
    return [round(i * step, 6) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
