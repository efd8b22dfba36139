"""What the chart of a plan shows, and that nothing in it covers anything else."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from seekforge.common.errors import TargetError
from seekforge.exporter.planner import chart
from seekforge.exporter.planner.answer import best, fewest
from seekforge.exporter.planner.chart import Row, memory_groups, plan_columns, spread, ticks, write_plan_chart
from seekforge.exporter.planner.question import Question
from seekforge.exporter.sizing.matrices import Precision
from seekforge.exporter.sizing.memory import Workload
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.targets import all_targets, load_target

MODELS = Path(__file__).parents[3] / "configs" / "models"
GPUS = [target for target in all_targets() if target.gpu is not None]
MARKED = (1024, 63 * 1024, 125 * 1024)

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is absent")


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    return ModelConfig.parse(yaml.safe_load((MODELS / "full.yaml").read_text(encoding="utf-8"))["config"], "full")


def rows_of(
    config: ModelConfig, names: list[str], precisions: tuple[Precision, ...], num_gpus: int | None = None
) -> list[Row]:
    rows = []
    for precision, name, context in itertools.product(precisions, names, MARKED):
        question, target, work = Question(precision, "fp8_ds"), load_target(name), Workload(context)
        found = (
            fewest(config, target, work, question)
            if num_gpus is None
            else best(config, target, num_gpus, work, question)
        )
        rows.append(Row(question, target, work, found))
    return rows


@pytest.fixture(scope="module")
def everything(full: ModelConfig) -> list[Row]:
    return rows_of(full, [target.name for target in GPUS], ("fp8", "bf16"))


# --- what is drawn ------------------------------------------------------------------------------------------


def test_each_precision_says_how_many_gpus_each_context_needs(full: ModelConfig, everything: list[Row]) -> None:
    fp8, bf16 = plan_columns(full, everything, marked=MARKED)
    assert (fp8.title, bf16.title) == ("weights in FP8", "weights in BF16")
    for column in (fp8, bf16):
        assert column.contexts == MARKED
        assert len(column.targets) == len(GPUS)
    counts = {name.split()[0]: [cell.num_gpus for cell in cells] for name, cells in fp8.targets}
    assert counts["h200"] == [8, 8, 8]
    assert counts["l40s"] == [24, 24, 24], "sixteen would do if stages were cut without the MTP module"
    counts = {name.split()[0]: [cell.num_gpus for cell in cells] for name, cells in bf16.targets}
    assert counts["h200"] == [16, 16, 16]


def test_a_color_is_a_memory_size_in_every_column(full: ModelConfig, everything: list[Row]) -> None:
    columns = plan_columns(full, everything, marked=MARKED)
    of_gpu: dict[str, set[int]] = {}
    for column in columns:
        for curve in column.curves:
            for name in curve.name.split(" × ")[1].split(" (")[0].split(", "):
                of_gpu.setdefault(name, set()).add(curve.group)
    assert set(of_gpu) == {target.name for target in GPUS}, "every GPU has a curve"
    assert all(len(groups) == 1 for groups in of_gpu.values())
    assert of_gpu["gh200"] == of_gpu["h20"] != of_gpu["h200"]
    assert max(group for groups in of_gpu.values() for group in groups) < len(chart._COLORS), "no color comes twice"


def test_no_curve_is_drawn_twice(full: ModelConfig, everything: list[Row]) -> None:
    """Within a memory size, that is: two sizes in two layouts may be as full as each other by chance."""
    for column in plan_columns(full, everything, marked=MARKED):
        for one, other in itertools.combinations(column.curves, 2):
            apart = max(abs(a - b) for (_, a), (_, b) in zip(one.points, other.points, strict=True))
            assert one.group != other.group or apart > 0.5, f"{one.name} lies on {other.name}"
        for curve in column.curves:
            assert set(MARKED) <= {context for context, _ in curve.points}


def test_what_does_not_fit_is_said_in_the_cell(full: ModelConfig) -> None:
    (column,) = plan_columns(full, rows_of(full, ["h100"], ("fp8",), num_gpus=8), marked=MARKED)
    ((_, cells),) = column.targets
    assert [cell.num_gpus for cell in cells] == [None, None, None]
    assert all(cell.text.endswith("GiB over") for cell in cells)
    assert min(y for _, y in column.curves[0].points) > 100


def test_a_target_without_a_curve_is_named(full: ModelConfig) -> None:
    rows = rows_of(full, ["rtx4090", "h200"], ("fp8",))
    rows[2] = replace(rows[2], found=None)
    (column,) = plan_columns(full, rows, marked=MARKED)
    assert [cell.text for cell in column.targets[0][1]] == ["48", "48", "> 128"]
    assert column.left_out == ("rtx4090",)
    assert len(column.curves) == 1


def test_nothing_to_draw_is_refused(full: ModelConfig) -> None:
    rows = [Row(Question("fp8", "fp8_ds"), load_target("h200"), Workload(1024), None)]
    with pytest.raises(TargetError, match="no number of GPUs up to 128 holds 1K tokens"):
        plan_columns(full, rows, marked=[1024])


# --- pure parts ---------------------------------------------------------------------------------------------


def test_memory_sizes_that_are_nearly_the_same_are_one_group() -> None:
    assert memory_groups({94.0, 78.0, 78.4, 23.5}) == {23.5: 0, 78.0: 1, 78.4: 1, 94.0: 2}
    assert memory_groups({100.0 + step for step in range(4)})[103.0] == 1, "a chain of near ones is no group"


def test_spread_keeps_order_and_makes_room() -> None:
    assert spread([], 0.25) == []
    assert spread([0.25, 0.75], 0.25) == [0.25, 0.75]
    assert spread([0.5, 0.5, 0.5], 0.25) == [0.25, 0.5, 0.75]
    assert spread([0.0, 1.0, 1.0], 0.25) == [0.125, 0.625, 0.875], "inside of the axes"
    values = [0.9, 0.1, 0.15, 0.95, 0.2, 0.91, 0.5]
    moved = spread(values, 0.1)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(moved[b] - moved[a] >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert moved[6] == 0.5


def test_ticks_name_the_marked_contexts_first() -> None:
    powers = [2**power for power in range(10, 18)]
    assert ticks(MARKED, [*powers, 163840]) == [1024, 2048, 4096, 8192, 16384, 32768, 63 * 1024, 125 * 1024]
    assert ticks([125 * 1024, 131072], []) == [125 * 1024]


# --- drawing ------------------------------------------------------------------------------------------------


def drawn_texts(figure: Any) -> list[Any]:
    """All texts but those of marks that an axis has outside of what it shows."""
    from matplotlib.text import Text

    hidden = set()
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        outside = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        hidden |= {label for tick in outside for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if text not in hidden]


@needs_matplotlib
@pytest.mark.parametrize("case", ["one", "all", "three precisions", "over"])
def test_no_text_covers_another(full: ModelConfig, everything: list[Row], case: str, tmp_path, monkeypatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    match case:
        case "one":
            rows = rows_of(full, ["h200"], ("fp8",))
        case "all":
            rows = everything
        case "three precisions":  # a third one, were there one
            third = [replace(row, question=replace(row.question, precision="fp4")) for row in everything[:36]]
            rows = [*everything, *third]
            held = everything[0].found.memory
            monkeypatch.setattr(chart, "memory_of", lambda config, layout, work, question: held)
        case _:
            rows = rows_of(full, ["rtx4090", "h100", "h20", "h200", "b200", "b300"], ("bf16",), num_gpus=8)
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args, **kwargs) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    path = tmp_path / "chart.png"
    write_plan_chart(path, full, rows, model="full", marked=MARKED)
    assert path.stat().st_size > 10_000
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    # of an annotation, the text without its line
    boxes = [(text.get_text(), Text.get_window_extent(text, canvas.get_renderer())) for text in drawn_texts(figures[0])]
    width, height = canvas.get_width_height()
    for name, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{name!r} is cut off"
    for (one, box), (other, over) in itertools.combinations(boxes, 2):
        assert not (box.x0 < over.x1 and over.x0 < box.x1 and box.y0 < over.y1 and over.y0 < box.y1), (one, other)


@needs_matplotlib
def test_the_same_chart_is_the_same_file(full: ModelConfig, tmp_path: Path) -> None:
    rows = rows_of(full, ["h200"], ("fp8", "bf16"))
    for name in ("a.svg", "b.svg"):
        write_plan_chart(tmp_path / name, full, rows, model="full", marked=MARKED)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]
