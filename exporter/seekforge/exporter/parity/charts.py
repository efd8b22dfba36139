"""Charts and tables of the report's page, as SVG and HTML text. Numbers stand behind each mark in `data-v`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from seekforge.exporter.parity.terminal import number

_COLOURS = ("#2f6fde", "#d9822b", "#2e9e6b", "#b455c9", "#c0392b", "#5f7d8c", "#8a6d3b", "#17a2b8")
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
) -> str:
    """A line chart as SVG with a mark per point; on a log axis a zero lies on the floor."""
    series = {name: [p for p in points if not isinstance(p[1], str)] for name, points in series.items()}
    points = [point for values in series.values() for point in values]
    if not points:
        return '<p class="dim">nothing to show</p>'
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

    parts = []
    for level, text in marks:
        at = y(10**level if log else level)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    if ticks is not None:
        places = [(i, text) for i, text in enumerate(ticks) if i % max(1, len(ticks) // 10) == 0]
    else:
        places = [(left + (right - left) * i / 5, f"{left + (right - left) * i / 5:.0f}") for i in range(6)]
    for value, text in dict.fromkeys(places):
        parts.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    for i, (name, values) in enumerate(series.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        line = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _ in values)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" opacity=".75"/>')
        radius = 4 if len(values) <= 80 else 2.5
        parts += [
            f'<circle class="hit" cx="{x(px):.1f}" cy="{y(py):.1f}" r="{radius}" fill="{colour}" '
            f'data-v="{escape(text)}"><title>{escape(text)}</title></circle>'
            for px, py, text in values
        ]
        legend.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} over '
        f'{escape(x_label)}">{"".join(parts)}</svg><div class="legend">{"".join(legend)}</div>'
        f"<figcaption>{escape(y_label)}: <output>{_HINT}</output></figcaption></figure>"
    )


def heat_map(case: dict[str, Any]) -> str:
    """The error of each token behind each layer of a case, as coloured cells."""
    columns, layers = len(case["positions"]), case["heat_layers"]
    width, height = (_WIDTH - _LEFT - _RIGHT) / columns, min(28.0, 360 / len(layers))
    total = _TOP + height * len(layers) + _BOTTOM
    cells = []
    for i, (layer, row) in enumerate(zip(layers, case["heat"])):
        y = _TOP + i * height
        every = max(1, len(layers) // 12)
        if i % every == 0:
            cells.append(f'<text x="{_LEFT - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{layer}</text>')
        for j, value in enumerate(row):
            where = case["positions"][j]
            text = f"layer {layer}, sequence {where['sequence']}, position {where['position']}: {number(value)}"
            cells.append(
                f'<rect class="hit" x="{_LEFT + j * width:.2f}" y="{y:.1f}" width="{width + 0.3:.2f}" '
                f'height="{height + 0.3:.1f}" fill="{_colour(value)}" data-v="{escape(text)}"/>'
            )
    every = max(1, columns // 6)
    for j in range(0, columns, every):
        x = _LEFT + (j + 0.5) * width
        position = case["positions"][j]["position"]
        cells.append(f'<text x="{x:.1f}" y="{total - 20:.1f}" text-anchor="middle">{position}</text>')
    cells.append(f'<text x="{_WIDTH / 2}" y="{total - 4:.1f}" text-anchor="middle">position</text>')
    middle = _TOP + height * len(layers) / 2
    cells.append(f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">layer</text>')
    scale = "".join(
        f'<span><i style="background:{_colour(10.0**e)}"></i>1e{e}</span>' for e in (-8, -6, -5, -4, -3, -2, -1, 0)
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {total:.0f}" role="img" aria-label="heat map of errors">'
        f'{"".join(cells)}</svg><div class="legend">{scale}</div>'
        f"<figcaption>{escape(case['name'])}, residual stream behind each layer: <output>{_HINT}</output></figcaption>"
        "</figure>"
    )


def _colour(value: Any) -> str:
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


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) and value.startswith("<span") else escape(str(value))
    numeric = isinstance(value, (int, float)) or (isinstance(value, str) and value[:1].isdigit() and len(value) < 9)
    return f'<td class="n">{text}</td>' if numeric else f"<td>{text}</td>"


def plain_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded_table(names: Sequence[str], rows: Sequence[Sequence[Any]], summary: str) -> str:
    """A table behind a line to tap on."""
    return f"<details><summary>{escape(summary)}</summary>{plain_table(names, rows)}</details>"
