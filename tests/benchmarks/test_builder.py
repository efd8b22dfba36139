"""The script that tabulates plugin engines: what it asks for, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.benchmarks import builder as bench_builder
from tests.benchmarks.builder import (
    Row,
    markdown,
    measure,
    target_of,
    wanted,
)
from tests.support.build_options import gpu_options

from seekforge.exporter.builder.tensorrt.check import Inputs, check, open_inputs
from seekforge.exporter.program.export import export
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.targets import load_target


def test_the_full_program_is_inlined_only_alone() -> None:
    assert wanted(["tiny", "full"], ["plugins", "inlined"], [80, 89]) == [
        ("tiny", "plugins", 80),
        ("tiny", "plugins", 89),
        ("tiny", "inlined", 80),
        ("tiny", "inlined", 89),
        ("full", "plugins", 80),
        ("full", "plugins", 89),
    ]
    assert wanted(["full"], ["inlined"], [120]) == [("full", "inlined", 120)]


def test_targets_differ_in_sm_form_and_profiles() -> None:
    plugins, inlined = target_of("plugins", 120, "all"), target_of("inlined", 80, "decode")
    assert (plugins.sm, plugins.kv_format, plugins.products) == (120, "fp8_ds", "fp8")
    assert (inlined.sm, inlined.kv_format, inlined.products) == (80, "bf16", "bf16")
    assert list(inlined.profiles) == ["decode"] and len(plugins.profiles) > 1


def test_the_table_has_a_row_per_graph_and_names_what_is_not_built() -> None:
    rows = [
        Row("full", "plugins", 89, "decode", "model", 1, 33490, 665, 61.25, 37.0, 1.71, 200.1),
        Row("full", "plugins", 89, "decode", "mtp", 1, 672, 11, 1.5, 1.5, 0.41, 10.0),
        Row("full", "inlined", 89, "decode", "model", fault="too large"),
    ]
    text = markdown(rows)
    assert "| full | plugins | 89 | decode | 1 | 33,490 | 665 | 61.2 | 37.0 | 1.71 | 200.1 |\n" in text
    assert "| full, mtp | plugins |" in text
    assert "| full | inlined | 89 | decode | not built: too large | – | – | – | – | – | – |\n" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


@pytest.fixture(scope="module")
def two_layers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Layers 1 and 2 of the tiny model, the two ends of a stage."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    program = tmp_path_factory.mktemp("layers") / "program"
    export(tiny_checkpoint, program, numerics=NUMERICS["fp8"], layer_range=(1, 3))
    return open_inputs(program, tiny_checkpoint)


def check_measured(inputs: Inputs, rows: Sequence[Row]) -> None:
    """The rows of plans add up to that of the build, the last one."""
    *plans, whole = rows
    num_nodes = check(inputs, load_target("rtx5090"), gpu_options(kernels=False)).num_nodes
    assert sum(row.runs * row.plugin_layers for row in plans) == whole.plugin_layers == sum(num_nodes.values())
    assert whole.cpu_seconds >= sum(row.cpu_seconds for row in plans)
    assert max(row.peak_gib for row in plans) <= whole.peak_gib
    assert all(row.plan_mb > 0 and row.peak_gib > 0 and not row.fault for row in rows)


def test_one_engine_is_measured(two_layers: Inputs) -> None:
    rows = measure(two_layers, "tiny", "plugins", 120, "decode")
    assert [(row.graph, row.runs) for row in rows] == [("model.1", 1), ("model.2", 1), ("build", 2)]
    check_measured(two_layers, rows)
    cut = measure(two_layers, "tiny", "plugins", 120, "decode", layers_per_engine=2)
    assert [(row.graph, row.runs) for row in cut] == [("model", 1), ("build", 1)]
    check_measured(two_layers, cut)


@pytest.mark.slow
def test_an_engine_of_several_plans_is_measured(tiny_programs: dict[str, Path], tiny_checkpoint: Path) -> None:
    """What plans there are, and how often each runs, is asserted of a build in tests/exporter/builder/tensorrt/."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    inputs = open_inputs(tiny_programs["fp8"], tiny_checkpoint)
    rows = measure(inputs, "tiny", "plugins", 120, "decode")
    runs = [("model.0", 1), ("model.1", 2), ("model.3", 1), ("mtp", 1), ("build", 5)]
    assert [(row.graph, row.runs) for row in rows] == runs
    check_measured(inputs, rows)


def test_a_program_that_cannot_be_built_is_a_row_with_its_fault(
    tiny_layers: dict[str, Path], tiny_checkpoint: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    exact = open_inputs(tiny_layers["exact"], tiny_checkpoint)
    (refused,) = measure(exact, "tiny", "plugins", 120, "decode")
    assert "--numerics fp8" in refused.fault


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_builder.py", "--programs", "huge"])
    with pytest.raises(SystemExit) as error:
        bench_builder.main()
    assert error.value.code == 2
    assert "'huge' is neither a program" in capsys.readouterr().err
