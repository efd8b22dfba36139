"""Charts and tables of the report's page, as SVG and HTML text. Numbers stand behind each mark in `data-v`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from seekforge.exporter.parity.report.html import piece
from seekforge.exporter.parity.report.terminal import number

_COLORS = ("#2f6fde", "#d9822b", "#2e9e6b", "#b455c9", "#c0392b", "#5f7d8c", "#8a6d3b", "#17a2b8")
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 24, 12, 40

_HINT = "tap the chart for numbers"

#: x, y, and the text behind the mark.
Point = tuple[float, float, str]


def line_chart(
    series: dict[str, list[Point]],
    *,
    x_label: str,
    y_label: str,
    log: bool,
    ticks: Sequence[str] | None = None,
) -> Markup:
    """Draw a line chart as SVG with a mark per point; on a log axis a zero lies on the floor."""
    series = {name: [p for p in points if not isinstance(p[1], str)] for name, points in series.items()}
    points = [point for values in series.values() for point in values]
    if not points:
        return piece("dim", "nothing to show")
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, right = min(xs), max(xs)
    if log:
        low = max(1e-9, min((y for y in ys if y > 0), default=1e-9))
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(max(*ys, low) * 1.001))
        top = max(top, bottom + 1)
        marks = [(float(e), f"1e{e}") for e in range(bottom, top + 1, max(1, (top - bottom) // 6))]
    else:
        bottom, top = min(0.98, min(ys)), max(1.0, max(ys))
        marks = [(bottom + (top - bottom) * i / 4, f"{bottom + (top - bottom) * i / 4:.3g}") for i in range(5)]

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((value - left) / (right - left) if right > left else 0.5)

    def y(value: float) -> float:
        level = (math.log10(value) if value > 0 else bottom) if log else value
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (max(level, bottom) - bottom) / (top - bottom)

    if ticks is not None:
        places = [(float(i), text) for i, text in enumerate(ticks) if i % max(1, len(ticks) // 10) == 0]
    else:
        places = [(left + (right - left) * i / 5, f"{left + (right - left) * i / 5:.0f}") for i in range(6)]
    drawn = [
        {
            "name": name,
            "color": _COLORS[i % len(_COLORS)],
            "points": [(x(px), y(py), text) for px, py, text in values],
        }
        for i, (name, values) in enumerate(series.items())
    ]
    grid = [(y(10**level if log else level), text) for level, text in marks]
    at = [(x(value), text) for value, text in dict.fromkeys(places)]
    return piece("line_chart", _WIDTH, _HEIGHT, _LEFT, _RIGHT, grid, at, drawn, x_label, y_label, _HINT)


def heat_map(case: dict[str, Any]) -> Markup:
    """Draw the error of each token behind each layer of a case as colored cells."""
    columns, layers = len(case["positions"]), case["heat_layers"]
    width, height = (_WIDTH - _LEFT - _RIGHT) / columns, min(28.0, 360 / len(layers))
    total = _TOP + height * len(layers) + _BOTTOM
    cells, labels = [], []
    every = max(1, len(layers) // 12)
    for i, (layer, row) in enumerate(zip(layers, case["heat"])):
        y = _TOP + i * height
        if i % every == 0:
            labels.append((_LEFT - 8, y + height / 2 + 4, layer))
        for j, value in enumerate(row):
            where = case["positions"][j]
            text = f"layer {layer}, sequence {where['sequence']}, position {where['position']}: {number(value)}"
            cells.append((_LEFT + j * width, y, _color(value), text))
    every = max(1, columns // 6)
    below = [(_LEFT + (j + 0.5) * width, case["positions"][j]["position"]) for j in range(0, columns, every)]
    middle = _TOP + height * len(layers) / 2
    scale = [(_color(10.0**e), f"1e{e}") for e in (-8, -6, -5, -4, -3, -2, -1, 0)]
    size = (_WIDTH, total, _TOP)
    return piece("heat_map", *size, cells, width + 0.3, height + 0.3, labels, below, middle, scale, case["name"], _HINT)


def _color(value: Any) -> str:
    """Dark blue for rounding noise over green and yellow to red for an error of the size of the values."""
    if isinstance(value, str):
        return "#000"
    level = 0.0 if value <= 1e-8 else min(1.0, (math.log10(value) + 8) / 8)
    stops = (
        (0.0, (24, 48, 92)),
        (0.35, (38, 121, 142)),
        (0.6, (84, 178, 104)),
        (0.8, (240, 205, 74)),
        (1.0, (205, 48, 42)),
    )
    for (low, first), (high, second) in itertools.pairwise(stops):
        if level <= high:
            share = (level - low) / (high - low)
            return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(first, second))
    return "#cd302a"


def plain_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """Return a table that scrolls sideways where it is too wide."""
    return piece("table", names, rows)


def folded_table(names: Sequence[str], rows: Sequence[Sequence[Any]], summary: str) -> Markup:
    """Return a table behind a line to tap on."""
    return piece("folded", summary, plain_table(names, rows))
