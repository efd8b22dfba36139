"""The chart of `plan --goal`: what a decode step of the best layouts consists of, one bar for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from seekforge.common.cli.charts import tokens, write_figure
from seekforge.exporter.planner.chart import Row
from seekforge.exporter.planner.forecast import ASSUMED, Goal, Ranked

#: Bars of one question.
MOST: Final = 8
#: Part of a `Forecast` -> its color and its word.
PARTS: Final = {
    "kernels": ("#1f77b4", "kernels"),
    "launches": ("#ff7f0e", "gaps between kernels"),
    "sums": ("#d62728", "sums over ranks"),
    "links": ("#9467bd", "from stage to stage"),
    "host": ("#7f7f7f", "host"),
}


def bars(ranking: Sequence[Ranked]) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Return for each of the best layouts its name, and (part, start, length) in milliseconds of what its bar is of."""
    result: list[tuple[str, list[tuple[str, float, float]]]] = []
    for one in ranking[:MOST]:
        at, pieces = 0.0, []
        for part in PARTS:
            length = float(getattr(one.forecast, part))
            pieces.append((part, at, length))
            at += length
        result.append((f"{one.parallelism} ({one.parallelism.num_gpus})", pieces))
    return result


def write_ranking_chart(
    path: Path, model: str, rows: Sequence[Row], rankings: Sequence[Sequence[Ranked]], goal: Goal
) -> None:
    """Draw the rankings into a .png or .svg, one below the other; questions that nothing holds are left out.

    Args:
        path: the file.
        model: the name of the model.
        rows: the questions.
        rankings: the layouts of each, the best first.
        goal: what they are ranked for.

    Raises:
        OutputError, EnvironmentFault: see `check_chart`.
    """
    panels = [(row, bars(ranking)) for row, ranking in zip(rows, rankings, strict=True) if ranking]
    heights = [0.9 + 0.32 * len(made) for _, made in panels] or [1.0]

    def draw(figure: Any) -> None:
        figure.suptitle(f"{model}: a decode step, on paper, ranked for {goal}", fontsize="x-large")
        for axes, (row, made) in zip(figure.subplots(len(heights), 1, squeeze=False)[:, 0], panels, strict=False):
            for place, (_, pieces) in enumerate(made):
                for part, start, length in pieces:
                    axes.barh(
                        place, length, left=start, color=PARTS[part][0], label=PARTS[part][1] if not place else None
                    )
            axes.set_yticks(range(len(made)), [name for name, _ in made])
            axes.invert_yaxis()
            axes.set_xlabel("ms")
            context = tokens(row.work.context)
            axes.set_title(f"{row.target.name}, {row.question.precision}, batch {row.work.batch}, context {context}")
            axes.legend(fontsize="small", loc="lower right")
        figure.supxlabel(f"assumed: {ASSUMED}", fontsize="x-small", wrap=True)

    write_figure(path, (9.0, 1.4 + sum(heights)), draw, dpi=130)
