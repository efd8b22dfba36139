"""Charts as PNG or SVG, drawn by matplotlib, which is imported only when a chart is wanted."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.cli.terminal import shown
from seekforge.common.errors import EnvironmentFault, OutputError
from seekforge.common.files import replace_file
from seekforge.common.requirements import install
from seekforge.common.temporary import temporary_folder
from seekforge.common.user_cache import user_cache

_FORMATS: Final = (".png", ".svg")
_SIZE: Final = (8.6, 5.0)
_DPI: Final = 150


@dataclass(frozen=True)
class Line:
    """A named line through (x, y) points."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One chart; several are drawn below one another.

    Attributes:
        title: the text above the chart.
        x_label, y_label: labels of the axes; the x axis is logarithmic to base 2, its marks are the points' own x.
        lines: the lines, at least one.
        limits: (name, value) of horizontal lines, such as the memory of a GPU.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    limits: tuple[tuple[str, float], ...] = ()


def check_chart(path: Path) -> None:
    """Refuse a chart that could not be written, before the work whose result it shows.

    Raises:
        OutputError: `path` ends in something else than .png or .svg.
        EnvironmentFault: matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(f"{path}: charts are written as PNG or SVG; name a file that ends in .png or .svg")
    if not os.environ.get("MPLCONFIGDIR"):  # it would make folders for its settings and fonts below HOME
        cache = user_cache()
        os.environ["MPLCONFIGDIR"] = str(_folder_of_this_process() if cache is None else cache / "matplotlib")
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise EnvironmentFault(f"charts are drawn by matplotlib; {install('charts')}") from None


def _folder_of_this_process() -> Path:
    """Return a temporary folder that goes when the process ends."""
    kept = contextlib.ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(temporary_folder("seekforge-charts"))


def write_charts(path: Path, panels: Sequence[Panel]) -> None:
    """Draw `panels` into the file `path`; an existing one is replaced when the new one is whole.

    Raises:
        OutputError, EnvironmentFault: see `write_figure`.
    """

    def draw(figure: Any) -> None:
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _draw(axes, panel)

    write_figure(path, (_SIZE[0], _SIZE[1] * len(panels)), draw, dpi=_DPI)


def write_figure(path: Path, size: tuple[float, float], draw: Callable[[Any], None], *, dpi: int) -> None:
    """Have a matplotlib figure drawn into the file `path`; an existing one is replaced when the new one is whole.

    Args:
        path: .png or .svg.
        size: the size of the figure in inches.
        draw: is given the figure.
        dpi: dots per inch of a .png.

    Raises:
        OutputError, EnvironmentFault: see `check_chart`; or the file cannot be written.
    """
    check_chart(path)
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    # the same chart is the same file: no date, no random names, and text that stays text
    # and names are text: no formula in dollars, which may be wrong or mean something else
    fixed = {"svg.hashsalt": "seekforge", "svg.fonttype": "none", "text.parse_math": False}
    drawn = io.BytesIO()
    with matplotlib.rc_context(fixed):
        figure = figures.Figure(figsize=size, layout="constrained")
        draw(figure)
        _write_powers_plainly(figure)
        _show_text(figure)
        suffix = path.suffix.lower()[1:]
        figure.savefig(drawn, format=suffix, dpi=dpi, metadata={"Date": None} if suffix == "svg" else None)
    try:
        replace_file(path, drawn.getvalue())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def _write_powers_plainly(figure: Any) -> None:
    """Have the marks of logarithmic axes written as numbers: formulas, as they are by default, stay unread here."""
    ticker = importlib.import_module("matplotlib.ticker")
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        base = axis.get_transform().base
        if isinstance(axis.get_major_formatter(), ticker.LogFormatterMathtext):
            axis.set_major_formatter(ticker.LogFormatter(base))
        if isinstance(axis.get_minor_formatter(), ticker.LogFormatterMathtext):
            axis.set_minor_formatter(ticker.LogFormatter(base, labelOnlyBase=False))


def _show_text(figure: Any) -> None:
    """Make every text in a figure one that is shown: a control character ends an SVG file, and has no glyph."""
    texts = importlib.import_module("matplotlib.text")
    for text in figure.findobj(texts.Text):
        text.set_text(shown(text.get_text(), keep="\n"))
        text.set_parse_math(False)


def _draw(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        axes.plot(*zip(*sorted(line.points), strict=True), label=line.name, linewidth=2, marker="o", markersize=3.5)
    dashes = itertools.cycle(["--", ":", "-."])
    for (name, value), style in zip(panel.limits, dashes, strict=False):
        axes.axhline(value, label=name, color="0.25", linestyle=style, linewidth=1.2)
    xs = sorted({x for line in panel.lines for x, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [tokens(int(x)) if x == int(x) else f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize="small")
    top = max([y for line in panel.lines for _, y in line.points] + [value for _, value in panel.limits])
    axes.set_ylim(0, 1.08 * top or 1.0)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="0.9")
    axes.legend(fontsize="small", frameon=False)


def tokens(count: int) -> str:
    """Return a number of tokens as people write it: 131072 -> 128K."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)
