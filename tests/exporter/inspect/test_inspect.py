"""`inspect` says what a folder is, counts as the specification does, and draws equal layers once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from seekforge.common.errors import ProgramError, SeekforgeError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.sparse import new_sparse_checkpoint
from seekforge.exporter.inspect.cli import inspect
from seekforge.exporter.inspect.describe import describe, family_of, kind_of, parameters
from seekforge.exporter.inspect.draw import draw, groups
from seekforge.formats.program import load_program


def _run(*args: object) -> Result:
    return CliRunner().invoke(inspect, [str(arg) for arg in args], catch_exceptions=False)


def test_parameters_are_those_of_the_specification() -> None:
    found = parameters(load_preset("full").config)
    assert found["stored"] == 685_355_329_792 and found["main"] == 671_877_944_064
    assert found["mtp"] == 11_624_027_648
    assert round(found["active"] / 1e9, 2) == 38.40 and round(found["active_without_embedding"] / 1e9, 2) == 37.48


def test_the_full_checkpoint_is_described_from_its_headers(tmp_path: Path) -> None:
    new_sparse_checkpoint(tmp_path / "full", "full")
    about = describe(tmp_path / "full")
    assert (about["kind"], about["num_tensors"], about["num_shards"]) == ("checkpoint", 92_425, 163)
    assert about["num_bytes"] == sum(about["bytes_by_family"].values()) == 689_469_018_240
    assert sum(about["bytes_by_layer"].values()) == about["num_bytes"]
    # spec §2.4
    assert about["bytes_by_layer"]["0"] == 598_064_576 and about["bytes_by_layer"]["30"] == 11_526_369_728
    assert {name: entry["elements"] for name, entry in about["dtypes"].items()} == {
        "f8e4m3": 681_408_069_632,
        "bf16": 3_947_229_184,
        "f32": 30_976 + 41_591_584,
    }


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.layers.7.mlp.experts.3.up_proj.weight_scale_inv", "mlp.experts.up_proj"),
        ("model.layers.12.self_attn.kv_b_proj.weight", "self_attn.kv_b_proj"),
        ("model.layers.0.self_attn.indexer.k_norm.bias", "self_attn.indexer.k_norm.bias"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_families_carry_no_numbers(name: str, family: str) -> None:
    assert family_of(name) == family


def test_a_program_shows_operators_inputs_and_bindings(tiny_programs: dict[str, Path]) -> None:
    about = json.loads(_run(tiny_programs["fp8"], "--json").stdout)
    assert about["kind"] == "program" and about["layers"] == [0, 4] and about["numerics"] == "fp8"
    graph = about["graphs"]["model"]
    assert graph["op_counts"]["seekforge.DsaAttention"] == 4 and graph["op_counts"]["seekforge.MoeExperts"] == 3
    assert graph["binding_ops"]["take"] > graph["num_weight_inputs"]
    assert graph["inputs"][0] == {"name": "input_ids", "dtype": "i64", "shape": ["B", "Q"], "role": "token"}
    text = " ".join(_run(tiny_programs["fp8"]).stdout.split())  # a narrow terminal wraps lines
    assert "latent_cache.{0..3}" in text and "4 DsaAttention" in text


def test_an_engine_shows_target_versions_and_self_check(tiny_engines: dict[str, Path]) -> None:
    about = json.loads(_run(tiny_engines["exact"], "--json").stdout)
    assert about["kind"] == "engine" and about["target"]["name"] == "cpu" and "onnxruntime" in about["versions"]
    assert about["graphs"]["model"]["op_counts"]["MatMul"] > 0
    assert "self-check:" in _run(tiny_engines["exact"]).stdout


@pytest.mark.parametrize("how", ["dot", "mermaid"])
def test_the_drawing_shows_each_kind_of_layer_once(tiny_programs: dict[str, Path], how: str) -> None:
    text = _run(tiny_programs["exact"], "--graph", how).stdout
    assert "layer 0" in text and "layers 1-3 (3 alike)" in text
    assert text.count("DsaAttention") == 2 and text.count("MoeExperts mlp.experts.w13") == 1
    assert "BlockFp8Linear self_attn.qkv_a_proj" in text and "MatMul lm_head" in text
    assert "RMSNormalization input_layernorm" in text and "Cast" not in text
    boxes = set(re.findall(r"g\d+n\d+", text.partition("-->" if how == "mermaid" else "->")[0]))
    assert set(re.findall(r"g\d+n\d+", text)) == boxes
    assert len(text.splitlines()) < 200


def test_every_box_but_the_first_ones_is_reached(tiny_programs: dict[str, Path]) -> None:
    folder = tiny_programs["fp8"]
    graph_io = load_program(folder).graphs["model"]
    weights = {spec.name for spec in graph_io.inputs if spec.role in ("weight", "table")}
    found = groups(onnx.load(folder / graph_io.file), weights)
    assert [group.title for group in found] == ["step", "layer 0", "layers 1-3 (3 alike)", "head"]
    for group in found[1:]:
        assert {target for _, target in group.edges} == set(range(len(group.boxes)))
    assert draw(found, "dot").startswith("digraph") and draw(found, "mermaid").startswith("flowchart")


def test_only_programs_are_drawn(tiny_checkpoint: Path) -> None:
    with pytest.raises(ProgramError, match="is a checkpoint, --graph draws programs"):
        _run(tiny_checkpoint, "--graph", "dot")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="is no checkpoint"):
        kind_of(tmp_path)
    with pytest.raises(ProgramError, match="absent: is not there, expected the folder of"):
        kind_of(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ProgramError, match="file: is a file, expected the folder of"):
        kind_of(tmp_path / "file")


def test_a_damaged_graph_is_one_line(tiny_programs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_programs["fp8"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ProgramError, match=r"model\.onnx: digest \w+, program\.json says"):
        describe(tmp_path)


@pytest.mark.parametrize("kind", ["engine", "program", "checkpoint"])
def test_without_the_export_extra_it_tells_all_but_the_nodes(
    kind: str, tiny_engines: dict[str, Path], tiny_programs: dict[str, Path], tiny_checkpoint: Path
) -> None:
    folder = {"engine": tiny_engines["fp8"], "program": tiny_programs["fp8"], "checkpoint": tiny_checkpoint}[kind]
    script = (
        "import sys\nfor name in ('onnx', 'onnxscript', 'onnx_ir', 'torch', 'safetensors', 'onnxruntime', 'triton'):\n"
        "    sys.modules[name] = None\nfrom seekforge.runtime.cli.main import main\nmain()"
    )

    def shown(*options: str) -> str:
        command = [sys.executable, "-c", script, "inspect", str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    text = shown()
    assert text.startswith(f"{kind} ")
    said = "nodes are counted with onnx, which is not here: pip install 'onnx>" in " ".join(text.split())
    assert said == (kind != "checkpoint")
    about = json.loads(shown("--json"))
    assert about["kind"] == kind and all(graph["op_counts"] is None for graph in about.get("graphs", {}).values())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.name)], ids=["FIFO", "loop"])
@pytest.mark.parametrize("kind", ["checkpoint", "program", "engine"])
def test_whatever_file_is_none_is_said(
    tiny_checkpoint: Path,
    tiny_programs: dict[str, Path],
    tiny_engines: dict[str, Path],
    tmp_path: Path,
    kind: str,
    make: Callable[[Path], object],
) -> None:
    source = {"checkpoint": tiny_checkpoint, "program": tiny_programs["fp8"], "engine": tiny_engines["fp8"]}[kind]
    for number, file in enumerate(sorted(path.name for path in source.iterdir())):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder, copy_function=os.link)
        (folder / file).unlink()
        make(folder / file)
        with pytest.raises(SeekforgeError, match=re.escape(file)):
            describe(folder)
