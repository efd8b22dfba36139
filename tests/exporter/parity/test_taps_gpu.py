"""`build --taps` for GPUs: taps are debug tensors of the plan, built for real by TensorRT-RTX without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seekforge.exporter.parity.engine_copy import available_taps
from seekforge.exporter.program.taps import SELECTIONS
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.cli import main as cli

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def build(program: Path, out: Path, *args: str) -> Result:
    command = ["build", str(program), str(out), "--target", "rtx4090", "--no-kernels", "--taps", *args]
    return CliRunner().invoke(cli.main, command)


def test_an_engine_with_taps_records_them_as_debug_tensors(
    tiny_programs: dict[str, Path], tiny_engines: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    result = build(tiny_programs["fp8"], out, "--json")
    assert result.exit_code == 0, result.output
    graph_ios = load_manifest(out).graphs
    debug = {
        name: {spec.name: spec for spec in graph_io.outputs if spec.role == "debug"}
        for name, graph_io in graph_ios.items()
    }
    # every point of every layer that a CPU engine shows, selections aside, which are outputs of any engine
    assert set(available_taps(out)) == set(available_taps(tiny_engines["fp8"]))
    assert {spec.name.partition(".")[0] for spec in graph_ios["model"].outputs if spec.role == "tap"} == set(SELECTIONS)
    assert debug["model"]["attn_out.3"].dtype == "bf16" and debug["model"]["router_logits.2"].dtype == "f32"
    assert debug["model"]["o_latent.0"].shape[:2] == ("B", "Q") and len(debug["model"]["o_latent.0"].shape) == 4
    assert debug["model"]["mlp_norm.2"].shape[0] == "T" and "hidden_states.5" in debug["mtp"]
    # the plan holds its plugins all the same
    assert json.loads(result.output)["audit"]["plugins"]["DsaAttention"] == 5


def test_taps_and_several_plans_are_refused(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    result = build(tiny_programs["fp8"], tmp_path / "engine", "--layers-per-engine", "2")
    assert result.exit_code == 2 and "leave out --layers-per-engine" in result.stderr
