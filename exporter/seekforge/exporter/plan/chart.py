"""A line chart as SVG text: memory over context. Enough for a plan; no drawing library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 860, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 190, 46, 60
_COLOURS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab", "#862e9c", "#495057")


@dataclass(frozen=True)
class Line:
    """A named line through (context, GiB) points."""

    name: str
    points: tuple[tuple[float, float], ...]


def line_chart(title: str, y_label: str, lines: Sequence[Line], limits: Sequence[tuple[str, float]]) -> str:
    """Return an SVG document; the x axis is logarithmic to base 2 and labelled in tokens.

    Args:
        title: above the chart.
        y_label: what the values are.
        lines: at least one, with at least two points.
        limits: (name, value) of horizontal lines, such as the memory of a GPU.
    """
    xs = [x for line in lines for x, _ in line.points]
    top = max([y for line in lines for _, y in line.points] + [value for _, value in limits]) * 1.08
    step = nice_step(top)
    low, high = math.log2(min(xs)), math.log2(max(xs))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low or 1.0)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="26" font-size="15">{escape(title)}</text>',
        f'<text x="16" y="{(_HEIGHT - _BOTTOM + _TOP) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(_HEIGHT - _BOTTOM + _TOP) / 2})">{escape(y_label)}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 14}" text-anchor="middle">context (tokens)</text>',
    ]
    for i in range(int(top / step) + 1):
        left, y = at(min(xs), i * step)
        right = _WIDTH - _RIGHT
        parts.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        x, y = at(2.0**power, 0)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + 5:.1f}" stroke="#495057"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{tokens(2**power)}</text>')
    labels: list[tuple[float, str, str]] = []
    for name, value in limits:
        x, y = at(max(xs), value)
        start = at(min(xs), value)[0]
        dashed = 'stroke="#343a40" stroke-dasharray="6 4"'
        parts.append(f'<line x1="{start:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y:.1f}" {dashed}/>')
        labels.append((y, name, "#343a40"))
    for i, line in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        labels.append((at(*line.points[-1])[1], line.name, colour))
    last = -math.inf
    for y, name, colour in sorted(labels):
        last = max(y + 4, last + 14)  # labels of near lines are moved apart
        parts.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{last:.1f}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def nice_step(top: float) -> float:
    """Return a round distance between at most ten grid lines below `top`."""
    raw = max(top, 1e-9) / 9
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))


def tokens(count: int) -> str:
    """Return a number of tokens as people write it: 131072 -> 128K."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)
