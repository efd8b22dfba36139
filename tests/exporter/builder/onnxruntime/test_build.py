"""The CPU engine folder: what is in it, what is shared, and what a wrong engine meets."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import seekforge.exporter.builder.onnxruntime.build as engine
from seekforge.common.cli.console import Stages
from seekforge.common.errors import CheckpointError, EngineError, OutputError, ProgramError, TargetError
from seekforge.exporter.builder.onnxruntime.build import build, check
from seekforge.exporter.builder.options import BuildOptions
from seekforge.exporter.program.export import export
from seekforge.exporter.program.inline import inline
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.engine.verify import verify_files
from seekforge.formats.engine.weight_file import WEIGHTS
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.targets import Precision, load_target
from seekforge.plugins.native import FUSED
from seekforge.plugins.registry import NATIVE, NATIVE_FORMS


def build_cpu(
    program: Path, out: Path, checkpoint: Path, max_model_len: int | None = None, precision: Precision = "f32"
) -> None:
    options = BuildOptions(max_model_len=max_model_len, precision=precision)
    build(
        program,
        out,
        target=options.target("cpu"),
        checkpoint_folder=checkpoint,
        options=options,
        force=False,
        progress=Stages(quiet=True),
    )


def external(folder: Path, graph: str) -> dict[str, dict[str, str]]:
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}


def test_graphs_hold_standard_operators_and_no_weight_inputs(tiny_engines: dict[str, Path]) -> None:
    """What the library of CPU operators has is a call of a function of the file, whose body is standard."""
    for folder in tiny_engines.values():
        for graph in ("model", "mtp"):
            model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
            assert {function.name for function in model.functions} <= {*NATIVE, *NATIVE_FORMS, *FUSED}
            assert {entry.domain for entry in inline(model).opset_import} == {""}
            assert all(value.name.count(".") <= 1 for value in model.graph.input)


def test_embedding_head_and_tables_are_stored_once(tiny_engines: dict[str, Path]) -> None:
    folder = tiny_engines["fp8"]
    model, mtp = external(folder, "model"), external(folder, "mtp")
    for name in ("embed_tokens.weight", "lm_head.weight.transposed", "rope_cos", "rope_sin", "hadamard"):
        assert model[name] == mtp[name]
    places = sorted((int(p["offset"]), int(p["length"])) for p in {**mtp, **model}.values())
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(places) if a != b)


def test_folded_weights_are_the_dequantized_checkpoint(
    tiny_engines: dict[str, Path], tiny_source: Checkpoint, tiny_config: ModelConfig
) -> None:
    place = external(tiny_engines["exact"], "model")["layers.1.mlp.experts.w2.folded"]
    inter, hidden = tiny_config.moe_intermediate_size, tiny_config.hidden_size
    stored = np.memmap(
        tiny_engines["exact"] / WEIGHTS,
        np.float32,
        mode="r",
        offset=int(place["offset"]),
        shape=(tiny_config.n_routed_experts, inter, hidden),
    )
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    scale = tiny_source.tensor(name + "_scale_inv").repeat(128, 0).repeat(128, 1)
    assert np.array_equal(stored[7], (tiny_source.tensor(name).astype(np.float32) * scale).T)


def test_the_manifest_covers_every_file(tiny_engines: dict[str, Path]) -> None:
    folder = tiny_engines["fp8"]
    manifest = load_manifest(folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {entry.path for entry in manifest.files} == files - {"manifest.json"}
    verify_files(folder, manifest, full=True)
    assert "target.yaml" in {entry.path for entry in manifest.files}
    assert manifest.cache.bytes_per_block == 64 * 4 * 5 * (128 + 64 + 128)
    assert manifest.limits.max_model_len == 131072


def test_the_self_check_is_tight_and_says_why(tiny_engines: dict[str, Path]) -> None:
    exact = load_manifest(tiny_engines["exact"]).self_check
    assert exact is not None
    assert len(exact.prompt_ids) == 72  # beyond index_topk
    assert [len(row.top_ids) for row in exact.rows] == [20, 20, 20]
    assert exact.tolerance < 1e-3
    assert "changed by 1e-06" in exact.reason and "PyTorch" in exact.source
    fp8 = load_manifest(tiny_engines["fp8"]).self_check
    assert fp8 is not None
    # a prompt that holds still was found, so that FP8 roundings do not force a wide tolerance
    assert fp8.tolerance < 0.03


def test_an_engine_that_computes_something_else_is_not_written(
    bent_engine: None, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="differs from PyTorch"):
        build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, None])
def test_a_checkpoint_that_changes_during_the_build_is_one_line(
    size: int | None, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """It was scanned already; a shard that shrinks would be SIGBUS if it were mapped."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    shard = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    class Spoil(Stages):
        def __call__(self, stage: str) -> None:
            super().__call__(stage)
            if stage == "specialize and fold":
                os.truncate(shard, shard.stat().st_size if size is None else size)
                os.utime(shard, ns=(0, 1))

    with pytest.raises(CheckpointError, match=f"{shard.name}: (is now 0 bytes|was written to).*do not write") as found:
        build(
            tiny_programs["exact"],
            tmp_path / "engine",
            target=load_target("cpu"),
            checkpoint_folder=copy,
            force=False,
            progress=Spoil(quiet=True),
        )
    assert "\n" not in str(found.value) and list(tmp_path.iterdir()) == [copy]


def test_an_engine_that_is_wrong_beyond_index_topk_only_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    class BentLate(engine.OrtSession):
        def run(self, inputs: Any, **options: Any) -> Any:
            outputs = super().run(inputs, **options)
            if inputs.input_ids.shape[1] > 64:
                outputs["logits"][-1] += np.float32(0.1)
            return outputs

    monkeypatch.setattr(engine, "OrtSession", BentLate)
    with pytest.raises(EngineError, match="at position 71"):
        build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint)


def test_a_shorter_context_cuts_the_tables(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint, max_model_len=512)
    manifest = load_manifest(tmp_path / "engine")
    assert manifest.limits.max_model_len == 512
    assert external(tmp_path / "engine", "model")["rope_cos"]["length"] == str(512 * 32 * 4)


def test_a_folder_that_is_taken_is_said_before_the_weights_are_scanned(
    monkeypatch: pytest.MonkeyPatch, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "scan_values", lambda *args, **kwargs: pytest.fail("the weights were scanned"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        build_cpu(tiny_programs["exact"], tmp_path, tiny_checkpoint)


def test_the_effective_target_lies_beside_the_engine(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = load_target("cpu", ["precision=int8", "limits.max_batch_size=3", "limits.max_model_len=512", "title=mine"])
    build(
        tiny_programs["exact"],
        tmp_path / "engine",
        target=target,
        checkpoint_folder=tiny_checkpoint,
        force=False,
        progress=Stages(quiet=True),
    )
    effective = load_target(str(tmp_path / "engine" / "target.yaml"))
    assert effective == target, "it can be built from again"
    manifest = load_manifest(tmp_path / "engine")
    assert effective.limits == manifest.limits
    assert "target.yaml" in {file.path for file in manifest.files}


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_the_weights_are_as_large_as_was_said_before_work(
    tiny_programs: dict[str, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "make_self_check", lambda *args: None)
    target = load_target("cpu", [f"precision={precision}", "limits.max_model_len=1000"])
    out = tmp_path / "engine"
    said = check(tiny_programs["fp8"], out, target=target, checkpoint_folder=tiny_checkpoint)
    build_cpu(tiny_programs["fp8"], out, tiny_checkpoint, 1000, precision)
    assert (out / WEIGHTS).stat().st_size == said.weight_bytes


def _full_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(engine, "scan_values", lambda *args, **kwargs: pytest.fail("the weights were scanned"))


@pytest.mark.parametrize(
    ("free", "precision", "message"),
    [
        (70_000_000, "f32", r"takes 183\.\d MB at f32, and .* has 70\.0 MB free; pass --precision int4 \(65\.\d MB\)"),
        (
            50_000_000,
            "f32",
            r"\d of its 4 layers fit with --precision int4: export with --num-layers \d, or pass an OUT",
        ),
        (50_000_000, "int4", r"\d of its 4 layers fit: export with --num-layers \d, or pass an OUT"),
        (1_000_000, "int8", r"has 1\.0 MB free; not one layer fits, or pass an OUT on a larger disk"),
    ],
)
def test_a_disk_that_is_too_small_is_said_before_work(
    monkeypatch: pytest.MonkeyPatch,
    tiny_programs: dict[str, Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    free: int,
    precision: Precision,
    message: str,
) -> None:
    _full_disk(monkeypatch, free)
    with pytest.raises(OutputError, match=message):
        build_cpu(tiny_programs["exact"], tmp_path / "a" / "engine", tiny_checkpoint, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_of_a_part_of_a_model_a_smaller_part_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    export(tiny_checkpoint, tmp_path / "part", numerics=NUMERICS["exact"], layer_range=(1, 3))
    _full_disk(monkeypatch, 40_000_000)
    with pytest.raises(OutputError, match="1 of its 2 layers fit with --precision int4: export with --layers 1-1"):
        build_cpu(tmp_path / "part", tmp_path / "engine", tiny_checkpoint)


def test_a_machine_that_is_too_small_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The engine may be for another machine, and weights are mapped: it is no refusal."""
    for memory, warned in ((None, False), (1 << 40, False), (1 << 20, True)):
        monkeypatch.setattr(engine, "_memory_bytes", lambda memory=memory: memory)
        planned = check(
            tiny_programs["exact"], tmp_path / "x", target=load_target("cpu"), checkpoint_folder=tiny_checkpoint
        )
        assert ("at the speed of the disk" in planned.warning) == warned
    assert "this machine has 1.0 MB of memory" in planned.warning


@pytest.mark.parametrize("length", (0, -1, 163841))
def test_a_context_beyond_the_model_is_refused(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, length: int
) -> None:
    with pytest.raises(TargetError, match="expected 1 to 163840"):
        build_cpu(tiny_programs["exact"], tmp_path / "engine", tiny_checkpoint, max_model_len=length)


def test_an_edited_program_is_refused(tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copytree(tiny_programs["exact"], program)
    with (program / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    with pytest.raises(ProgramError, match=r"model\.onnx: digest"):
        build_cpu(program, tmp_path / "engine", tiny_checkpoint)


def test_unknown_targets_are_answered_with_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'cpuu'.*cpu.*did you mean cpu"):
        load_target("cpuu")
