"""The chart of a plan: how many GPUs each context needs, and what it fills of one of them.

For each precision a table of GPUs by contexts, colored by their number, stands over the memory of one GPU for any
context. What is drawn is decided by pure functions; matplotlib is imported where it is drawn, as in `plugins.charts`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from seekforge.common.cli.charts import tokens, write_figure
from seekforge.common.errors import TargetError
from seekforge.exporter.planner.answer import GPU_COUNTS, Answer, memory_of
from seekforge.exporter.planner.question import Question
from seekforge.exporter.sizing.memory import GIB, Workload, usable_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import TargetConfig

#: Memories that differ by less are one group, with one color.
_ALIKE: Final = 0.02
#: Inches: of one precision; of one line of small text.
_WIDTH: Final = 8.4
_LABEL_INCH: Final = 0.19
#: Doublings between two contexts that an axis can name side by side.
_TICK_ROOM: Final = 0.7
#: A y axis that ends higher is logarithmic.
_LINEAR_PERCENT: Final = 250.0
_DPI: Final = 130
#: Twelve hues that differ in lightness too; GPUs have fewer memory sizes than that today.
_COLORS: Final = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf",
    "#8c564b", "#e377c2", "#6b7a00", "#000000", "#7f7f7f", "#003f88",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One question and its answer, None where no number of GPUs does."""

    question: Question
    target: TargetConfig
    work: Workload
    found: Answer | None

    @property
    def fits(self) -> bool:
        """Whether there is a layout that holds the workload."""
        return self.found is not None and self.found.fits


@dataclass(frozen=True)
class Cell:
    """How many GPUs one context needs.

    Attributes:
        text: the number, or what is missing.
        num_gpus: None where it does not fit.
    """

    text: str
    num_gpus: int | None


@dataclass(frozen=True)
class Curve:
    """How full a GPU is over the context.

    Attributes:
        name: number and names of the GPUs that share it.
        group: number of the memory size, by which it is colored.
        points: (context, percent of the usable memory).
    """

    name: str
    group: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Column:
    """What is drawn of one precision.

    Attributes:
        title: above it.
        contexts: what the table has columns of, marked on the curves too.
        targets: (name and memory, cells) of the table's rows.
        curves: below the table.
        sized_for: the context whose number of GPUs the curves have.
        left_out: targets without a curve, for want of such a number.
    """

    title: str
    contexts: tuple[int, ...]
    targets: tuple[tuple[str, tuple[Cell, ...]], ...]
    curves: tuple[Curve, ...]
    sized_for: int
    left_out: tuple[str, ...]


def write_plan_chart(
    path: Path, config: ModelConfig, rows: Sequence[Row], *, model: str, marked: Sequence[int]
) -> None:
    """Draw `rows` into the file `path`; an existing one is replaced when the new one is whole.

    Args:
        path: .png or .svg.
        config: the model.
        rows: answers for all precisions, targets and contexts.
        model: its name.
        marked: contexts among those of `rows` that the table shows.

    Raises:
        OutputError, EnvironmentFault: see `plugins.charts.write_figure`.
        TargetError: nothing fits anywhere.
    """
    columns = plan_columns(config, rows, marked=marked)
    work = rows[0].work
    title = f"{model}: GPUs and their memory, batch {work.batch}{', with MTP' if work.draft_tokens else ''}"
    _write(path, title, columns)


def plan_columns(config: ModelConfig, rows: Sequence[Row], *, marked: Sequence[int]) -> list[Column]:
    """Return what is drawn: one column per precision.

    Raises:
        TargetError: no target has a number of GPUs for the longest context.
    """
    longest = max(row.work.context for row in rows)
    if all(row.found is None for row in rows if row.work.context == longest):
        raise TargetError(f"nothing to draw: no number of GPUs up to {GPU_COUNTS[-1]} holds {tokens(longest)} tokens")
    groups = memory_groups({_usable_gib(row.target) for row in rows})
    columns = []
    for precision in dict.fromkeys(row.question.precision for row in rows):
        of_precision = [row for row in rows if row.question.precision == precision]
        by_size = sorted({row.target.name: row.target for row in of_precision}.values(), key=_usable_gib)
        cells = {(row.target.name, row.work.context): _cell(row.found) for row in of_precision}
        at_longest = [row for row in of_precision if row.work.context == longest]
        columns.append(
            Column(
                title=f"weights in {precision.upper()}",
                contexts=tuple(marked),
                targets=tuple(
                    (f"{target.name}  {_usable_gib(target):.0f} GiB", tuple(cells[target.name, c] for c in marked))
                    for target in by_size
                ),
                curves=tuple(_curves(config, at_longest, marked, groups)),
                sized_for=longest,
                left_out=tuple(row.target.name for row in at_longest if row.found is None),
            )
        )
    return columns


def memory_groups(sizes: set[float]) -> dict[float, int]:
    """Number memory sizes upwards; sizes that are nearly the same share a number."""
    groups: dict[float, int] = {}
    start, number = -math.inf, -1
    for size in sorted(sizes):
        if size > start * (1 + _ALIKE) or number < 0:
            start, number = size, number + 1
        groups[size] = number
    return groups


def _usable_gib(target: TargetConfig) -> float:
    assert target.gpu is not None
    return usable_bytes(target.gpu.memory_gib) / GIB


def _cell(answer: Answer | None) -> Cell:
    if answer is None:
        return Cell(f"> {GPU_COUNTS[-1]}", None)
    if not answer.fits:
        return Cell(f"{(answer.memory.total - answer.usable) / GIB:.0f} GiB over", None)
    return Cell(str(answer.parallelism.num_gpus), answer.parallelism.num_gpus)


def _curves(config: ModelConfig, rows: Sequence[Row], marked: Sequence[int], groups: dict[float, int]) -> list[Curve]:
    """A curve per row that has an answer; GPUs of one memory group in the same layout share one, the fullest."""
    most = config.max_position_embeddings
    contexts = sorted({2**power for power in range(10, most.bit_length()) if 2**power < most} | {most, *marked})
    shared: dict[tuple[int, Parallelism], list[Curve]] = {}

    def filled(row: Row, parallelism: Parallelism, context: int) -> int:
        return memory_of(
            config, parallelism, replace(row.work, context=context), replace(row.question, target=row.target)
        ).total

    for row in rows:
        if row.found is not None:
            group, usable = groups[_usable_gib(row.target)], row.found.usable
            points = tuple((n, 100 * filled(row, row.found.parallelism, n) / usable) for n in contexts)
            shared.setdefault((group, row.found.parallelism), []).append(Curve(row.target.name, group, points))
    curves = []
    for (group, parallelism), members in shared.items():
        fullest = max(members, key=lambda curve: curve.points[-1][1])
        names = f"{parallelism.num_gpus} × {', '.join(curve.name for curve in members)}"
        curves.append(Curve(names if parallelism.num_gpus == 1 else f"{names} ({parallelism})", group, fullest.points))
    return curves


# --- drawing ------------------------------------------------------------------------------------------------


def ticks(marked: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return the contexts that an axis names: `marked` ones first, `others` where there is room for their text."""
    shown: list[int] = []
    for context in [*marked, *others]:
        if all(abs(math.log2(context / other)) >= _TICK_ROOM for other in shown):
            shown.append(context)
    return sorted(shown)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return places from 0 to 1 near `values`, each `gap` high, none over another; their order stays."""
    crowds: list[list[int]] = []
    centers: list[float] = []

    def settle() -> None:
        reach = gap * len(crowds[-1]) / 2
        mean = sum(values[index] for index in crowds[-1]) / len(crowds[-1])
        centers.append(min(max(mean, reach), 1 - reach))

    for index in sorted(range(len(values)), key=values.__getitem__):
        crowds.append([index])
        settle()
        while len(crowds) > 1 and centers[-1] - centers[-2] < gap * (len(crowds[-1]) + len(crowds[-2])) / 2:
            crowds[-2:] = [crowds[-2] + crowds[-1]]
            del centers[-2:]
            settle()
    moved = [0.0] * len(values)
    for crowd, center in zip(crowds, centers, strict=True):
        for place, index in enumerate(crowd):
            moved[index] = center + gap * (place - (len(crowd) - 1) / 2)
    return moved


def _write(path: Path, title: str, columns: Sequence[Column]) -> None:
    num_rows = max(len(column.targets) for column in columns)
    heights = (0.9 + 0.3 * num_rows, max(4.2, 1.2 + 2 * _LABEL_INCH * max(len(column.curves) for column in columns)))
    widest = max(len(cell.text) for column in columns for _, cells in column.targets for cell in cells)
    width = max(_WIDTH, 4.6 + len(columns[0].contexts) * (0.4 + 0.06 * widest))

    def draw(figure: Any) -> None:
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
        figure.suptitle(title, fontsize="x-large")
        axes = figure.subplots(2, len(columns), squeeze=False, height_ratios=heights)
        scale = _scale(columns)
        for number, column in enumerate(columns):
            _draw_table(axes[0, number], column)
            _draw_curves(axes[1, number], column, scale, heights[1] - 1.0)

    write_figure(path, (width * len(columns), 0.5 + sum(heights)), draw, dpi=_DPI)


@dataclass(frozen=True)
class _Scale:
    """The y axis of all curves in percent, logarithmic when some GPU is filled several times over."""

    low: float
    high: float
    is_log: bool

    def place(self, percent: float) -> float:
        """Where a value stands, from 0 to 1."""
        low, high, percent = (math.log2(y) if self.is_log else y for y in (self.low, self.high, percent))
        return (percent - low) / (high - low)


def _scale(columns: Sequence[Column]) -> _Scale:
    values = [100.0, *(y for column in columns for curve in column.curves for _, y in curve.points)]
    low, high = min(values), max(values)
    if high > _LINEAR_PERCENT:
        return _Scale(low / 1.15, high * 1.15, is_log=True)
    return _Scale(max(0.0, low - 0.06 * (high - low)), high + 0.06 * (high - low), is_log=False)


def _draw_table(axes: Any, column: Column) -> None:
    """Numbers of GPUs in cells, the more the darker; grey where it does not fit."""
    colors = importlib.import_module("matplotlib").colormaps["YlGnBu"]
    for y, (_, cells) in enumerate(column.targets):
        for x, cell in enumerate(cells):
            shade = 0.0 if cell.num_gpus is None else min(1.0, math.log2(cell.num_gpus) / math.log2(GPU_COUNTS[-1]))
            color = "0.88" if cell.num_gpus is None else colors(0.05 + 0.85 * shade)
            axes.barh(y, 0.96, left=x - 0.48, height=0.9, color=color)
            axes.text(x, y, cell.text, ha="center", va="center", color="white" if shade > 0.6 else "black")
    axes.set_xlim(-0.5, len(column.contexts) - 0.5)
    axes.set_ylim(len(column.targets) - 0.5, -0.5)
    axes.set_xticks(range(len(column.contexts)), [tokens(context) for context in column.contexts])
    axes.set_yticks(range(len(column.targets)), [name for name, _ in column.targets])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{column.title}: number of GPUs, by tokens of context", loc="left", fontweight="bold")


def _draw_curves(axes: Any, column: Column, scale: _Scale, height_inch: float) -> None:
    """How full a GPU is; names stand right of the axes, in the color of their curve, dots at the table's contexts."""
    names = [("usable memory", "black", 100.0)]
    axes.axhline(100.0, color="black", linestyle="--", linewidth=1.5)
    for curve in column.curves:
        color = _COLORS[curve.group % len(_COLORS)]
        xs, ys = zip(*curve.points, strict=True)
        dots = [place for place, x in enumerate(xs) if x in column.contexts]
        axes.plot(xs, ys, color=color, linewidth=1.8, marker="o", markersize=4.5, markevery=dots)
        names.append((curve.name, color, ys[-1]))
    heights = spread([scale.place(y) for *_, y in names], _LABEL_INCH / height_inch)
    for (name, color, y), height in zip(names, heights, strict=True):
        axes.annotate(
            name,
            (1.0, y),
            xytext=(1.04, height),
            xycoords=("axes fraction", "data"),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
    for context in column.contexts:
        axes.axvline(context, color="0.75", linewidth=1, zorder=0)
    xs = [x for x, _ in column.curves[0].points] if column.curves else list(column.contexts)
    shown = ticks(column.contexts, xs)
    axes.set_xscale("log", base=2)
    axes.set_xlim(xs[0] / 1.15, xs[-1])
    axes.set_xticks(shown, [tokens(x) for x in shown], fontsize="small")
    if scale.is_log:
        axes.set_yscale("log", base=2)
        axes.set_yticks([y for y in (100 * 2.0**power for power in range(-7, 14)) if scale.low <= y <= scale.high])
    axes.set_ylim(scale.low, scale.high)
    axes.yaxis.set_major_formatter("{x:,.0f} %")
    axes.minorticks_off()
    note = f"\nno curve, more than {GPU_COUNTS[-1]} GPUs: {', '.join(column.left_out)}" if column.left_out else ""
    axes.set_xlabel(f"context (tokens){note}")
    axes.set_ylabel("filled of the fullest GPU's usable memory")
    axes.set_title(
        f"{column.title}: memory, with the GPUs for {tokens(column.sized_for)}", loc="left", fontweight="bold"
    )
    axes.grid(color="0.93")
