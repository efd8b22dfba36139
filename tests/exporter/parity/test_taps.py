"""Taps: every tensor inside a layer can be looked at, and looking changes no bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from seekforge.common.errors import EngineError
from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.models.shared.sparse.taps import ATTENTION
from seekforge.exporter.models.shared.taps import DENSE, MOE
from seekforge.exporter.parity.engine_copy import available_taps, tapped_copy
from seekforge.exporter.program.taps import layer_points, point_width
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import load_manifest, save_manifest
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, MTP, lay_out
from seekforge.runtime.cli import main as cli

LENGTH = 90


def results(folder: Path, graph: str = "model") -> dict[str, np.ndarray]:
    """Prefill, then one token; outputs of both, and caches."""
    session = OrtSession(folder, {graph: load_manifest(folder).graphs[graph]}, 4, threads=1)
    rng = np.random.default_rng(1)
    ids = rng.integers(16, 900, LENGTH + 1).tolist()
    values: dict[str, np.ndarray] = {}
    for number, (start, stop) in enumerate(((0, LENGTH), (LENGTH, LENGTH + 1))):
        step = lay_out([ids[start:stop]], [start], [[2, 1]])
        if graph == MTP:
            step = replace(step, hidden_in=rng.standard_normal((1, stop - start, 512), np.float32))
        values |= {f"{name} {number}": value for name, value in session.run(step, graph=graph).items()}
    return values | {name: session.cache(name) for name in session.caches}


@pytest.mark.parametrize("graph", ("model", "mtp"))
@pytest.mark.parametrize("numerics", ("exact", "fp8"))
def test_taps_change_no_bit(tiny_engines: dict[str, Path], tmp_path: Path, numerics: str, graph: str) -> None:
    engine = tiny_engines[numerics]
    tapped = tapped_copy(engine, tmp_path / "tapped", available_taps(engine))
    verify_files(tapped, load_manifest(tapped), full=True)
    plain, shown = results(engine, graph), results(tapped, graph)
    assert len(shown) > len(plain) + 40
    for name, value in plain.items():
        assert np.array_equal(value, shown[name]), name


def test_an_engine_built_with_taps_gives_the_same_bits(
    tiny_engines: dict[str, Path], tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    arguments = ["build", tiny_programs["fp8"], out, "--target", "cpu", "--checkpoint", tiny_checkpoint]
    result = CliRunner().invoke(cli.main, [str(arg) for arg in [*arguments, "--taps", "--quiet"]])
    assert result.exit_code == 0, result.output
    plain, shown = results(tiny_engines["fp8"]), results(out)
    assert "attn_out.3 0" in shown and "attn_out.3 0" not in plain
    assert all(np.array_equal(value, shown[name]) for name, value in plain.items())
    assert set(available_taps(out)) == set(available_taps(tiny_engines["fp8"]))


def test_every_point_of_every_layer_is_there(tiny_engines: dict[str, Path], tiny_config: ModelConfig) -> None:
    engine = tiny_engines["fp8"]
    taps = set(available_taps(engine))
    for layer in range(tiny_config.num_hidden_layers + 1):
        points = set(layer_points(tiny_config, layer))
        if layer in (0, tiny_config.mtp_layer):
            points -= {"residual"}  # the stream starts here
        assert points <= {name.partition(".")[0] for name in taps if name.endswith(f".{layer}")}, layer
    assert {f"{name}.{tiny_config.num_hidden_layers + 1}" for name in INTERMEDIATE_TENSORS} <= taps


def test_a_tap_has_the_width_that_estimates_use(
    tiny_engines: dict[str, Path], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    tapped = tapped_copy(tiny_engines["exact"], tmp_path / "tapped", available_taps(tiny_engines["exact"]))
    shown = results(tapped)
    for layer, kind in ((0, DENSE), (2, MOE)):
        for point in (*INTERMEDIATE_TENSORS, *ATTENTION, *kind):
            name = f"{point}.{layer} 0"
            if name in shown:
                assert shown[name].size == LENGTH * point_width(tiny_config, point), name


def test_a_copy_shares_the_weights_and_leaves_the_engine_alone(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    engine = tiny_engines["exact"]
    before = {path.name: path.stat().st_mtime_ns for path in engine.iterdir()}
    tapped = tapped_copy(engine, tmp_path / "tapped", ["attn_out.1"])
    assert (tapped / "weights.bin").samefile(engine / "weights.bin")
    assert {path.name: path.stat().st_mtime_ns for path in engine.iterdir()} == before
    names = [value.name for value in onnx.load(tapped / "model.onnx", load_external_data=False).graph.output]
    assert names.count("attn_out.1") == 1 and "attn_out.2" not in names


def test_a_compiled_engine_is_refused_with_what_to_do(tiny_engines: dict[str, Path], tmp_path: Path) -> None:
    manifest = load_manifest(tiny_engines["exact"])
    target = manifest.target.model_copy(update={"backend": "tensorrt", "name": "h200"})
    save_manifest(tmp_path, manifest.model_copy(update={"target": target}))
    with pytest.raises(EngineError, match="build it with --taps"):
        tapped_copy(tmp_path, tmp_path / "out", ["attn_out.1"])
