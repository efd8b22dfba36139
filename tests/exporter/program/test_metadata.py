"""What graph files say of themselves, and the form of a program that ONNX Runtime opens without seekforge."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.support.made_once import made_once
from tests.support.ort_session import open_session

from seekforge.common.dtypes import NUMPY, ONNX
from seekforge.exporter.builder.onnxruntime.session import OrtSession
from seekforge.exporter.program.export import export
from seekforge.exporter.program.inline import plain
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.numerics import EXACT
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.step_io import MODEL, lay_out
from seekforge.formats.weight_recipes import evaluate, retarget

GRAPHS = ("model", "mtp")


def properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.fixture(scope="module")
def program(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of the tiny checkpoint with its plain form."""

    def make(root: Path) -> None:
        export(tiny_checkpoint, root / "program", numerics=EXACT, plain_f32=True)

    return made_once(tmp_path_factory, "plain", make) / "program"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_program_says_who_made_it_of_what(program: Path, name: str) -> None:
    model = onnx.load(program / f"{name}.onnx")
    assert (model.producer_name, model.domain) == ("seekforge", "seekforge")
    assert model.producer_version == importlib.metadata.version("seekforge")
    assert "one step over paged caches" in model.doc_string and model.graph.doc_string == model.doc_string
    told = properties(model)
    assert (told["form"], told["graph"], told["numerics"]) == ("canonical program", name, "exact")
    assert told["layers"] == ("0-3 of 4" if name == "model" else "mtp")
    assert "DsaAttention" in told["custom_operators"].split(", ")
    assert list(told) == sorted(told)
    assert all(function.doc_string for function in model.functions)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_input_and_output_that_is_no_weight_is_explained(program: Path, name: str) -> None:
    graph_io = load_program(program).graphs[name]
    weights = {spec.name for spec in graph_io.inputs if spec.role == "weight"}
    graph = onnx.load(program / f"{name}.onnx").graph
    silent = [
        value.name for value in (*graph.input, *graph.output) if not value.doc_string and value.name not in weights
    ]
    assert silent == []


def test_nothing_in_a_graph_names_this_machine_and_two_exports_are_equal(
    program: Path, tiny_programs: dict[str, Path], tiny_checkpoint: Path, tiny_config: ModelConfig
) -> None:
    one, other = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (program, tiny_programs["exact"])
    )
    assert {name: raw for name, raw in one.items() if ".f32." not in name} == other
    names = sorted(name for name in one if name.endswith(".onnx"))
    assert names == ["model.f32.onnx", "model.onnx", "mtp.f32.onnx", "mtp.onnx"]
    for name in names:
        raw = one[name]
        if ".f32." in name:  # made once more of the other export
            canonical = onnx.load_from_string(other[name.replace(".f32", "")])
            assert raw == plain(canonical, tiny_config).SerializeToString(deterministic=True)
        assert str(tiny_checkpoint).encode() not in raw and str(Path.home()).encode() + b"/" not in raw


@pytest.mark.parametrize("name", GRAPHS)
def test_an_engine_says_what_it_is(tiny_engines: dict[str, Path], name: str) -> None:
    model = onnx.load(tiny_engines["fp8"] / f"{name}.onnx", load_external_data=False)
    told = properties(model)
    assert (told["form"], told["graph"]) == ("engine for ONNX Runtime", name)
    assert told["custom_operators"].split(", ") == [function.name for function in model.functions]
    assert "weights are constants" in model.doc_string and model.producer_version


@pytest.mark.parametrize("name", GRAPHS)
def test_the_canonical_form_does_not_open_alone_and_the_plain_one_does(program: Path, name: str) -> None:
    plain = onnx.load(program / f"{name}.f32.onnx")
    assert not plain.functions and {node.domain for node in plain.graph.node} == {""}
    assert properties(plain)["form"] == "plain program in f32"
    session = open_session(program / f"{name}.f32.onnx")
    assert session.get_modelmeta().producer_name == "seekforge"
    assert session.get_modelmeta().custom_metadata_map["graph"] == name
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # no bf16 products on a CPU
        open_session(program / f"{name}.onnx")


def test_the_plain_form_computes_what_the_engine_computes(
    program: Path, tiny_source: Checkpoint, tiny_engines: dict[str, Path]
) -> None:
    step = lay_out([[5, 6, 7, 8, 9]], [0], [[1]])
    folder = tiny_engines["exact"]
    expected = OrtSession(folder, {MODEL: load_manifest(folder).graphs[MODEL]}, 2, threads=1).run(step)["logits"]
    session = open_session(program / "model.f32.onnx")
    recipes = load_bindings(program)["model"]
    feeds: dict[str, Any] = {}
    held = []  # ONNX Runtime reads these where they lie, and keeps none alive
    for value in session.get_inputs():
        if value.name in recipes:
            recipe = retarget(recipes[value.name], activations="f32", fp8_dtype="f8e4m3")
            weight = np.ascontiguousarray(evaluate(recipe, tiny_source))
            held.append(weight.view(np.uint8) if weight.dtype == NUMPY["f8e4m3"] else weight)
            feeds[value.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(held[-1], ONNX[recipe.dtype])
        elif "_cache" in value.name:
            feeds[value.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros((128, value.shape[1]), np.float32))
        else:
            feeds[value.name] = ort.OrtValue.ortvalue_from_numpy(step.array(value.name))
    (found,) = session.run_with_ort_values(["logits"], feeds)
    assert np.abs(found.numpy() - expected).max() <= 1e-4 * expected.std()
