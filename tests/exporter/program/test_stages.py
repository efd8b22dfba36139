"""A graph cut between layers computes bit for bit what the whole one computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.support.ort_session import open_session

from seekforge.common.errors import ProgramError
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.program.export import export
from seekforge.exporter.program.specialize import specialize
from seekforge.exporter.program.stages import cut, stage_ranges
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import EXACT
from seekforge.formats.program import load_program
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization

CPU = Specialization("f32", "float8", "f32", "ort")
_DTYPES = {1: np.float32, 6: np.int32, 7: np.int64}


@pytest.mark.parametrize(
    ("layers", "most", "expected"),
    [
        ((0, 61), 16, [(0, 15), (15, 30), (30, 45), (45, 61)]),
        ((0, 4), 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((3, 8), 2, [(3, 4), (4, 6), (6, 8)]),
        ((0, 4), 9, [(0, 4)]),
    ],
)
def test_ranges_are_even_and_no_longer_than_asked(layers, most: int, expected) -> None:
    assert stage_ranges(layers, most) == expected


def feeds_of(model: onnx.ModelProto, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Small random values for every input: one sequence of four tokens."""
    sizes = {"B": 1, "Q": 4, "MB": 2, "N": 2, "NS": 192}
    fixed = {
        "input_ids": np.array([[5, 6, 7, 8]]),
        "positions": np.array([[0, 1, 2, 3]]),
        "slot_mapping": np.array([[64, 65, 66, 67]]),
        "block_table": np.array([[1, 2]]),
        "logits_index": np.array([1, 3]),
    }
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in tensor.shape.dim]
        if value.name in fixed:
            feeds[value.name] = fixed[value.name].astype(_DTYPES[tensor.elem_type])
        elif tensor.elem_type == onnx.TensorProto.FLOAT8E4M3FN:  # bytes of small values of either sign
            feeds[value.name] = (rng.integers(0x10, 0x30, shape) | rng.choice([0, 0x80], shape)).astype(np.uint8)
        elif "cache" in value.name:
            feeds[value.name] = np.zeros(shape, np.float32)
        else:
            feeds[value.name] = (rng.standard_normal(shape) / 8).astype(np.float32)
    return feeds


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(model.SerializeToString())
    names = [value.name for value in session.get_outputs()]
    given = {value.name: _value(feeds[value.name]) for value in session.get_inputs()}
    results = session.run_with_ort_values(names, given)
    return {name: value.numpy() for name, value in zip(names, results, strict=True)}


def _value(array: np.ndarray) -> ort.OrtValue:
    if array.dtype == np.uint8:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(array)


@pytest.mark.parametrize(("numerics", "layers_per_stage"), [("exact", 1), ("exact", 2), ("exact", 3), ("fp8", 1)])
def test_stages_compute_what_the_whole_computes(
    tiny_programs: dict[str, Path], numerics: str, layers_per_stage: int
) -> None:
    parts, places = check_stages(tiny_programs[numerics], layers_per_stage)
    assert len(places) == 2 * min(len(parts) - 1, 2), "two values go on, and two places of each are used in turns"
    for part in parts[1:]:
        adds = next(node for node in part.graph.node if node.op_type == "Add")
        casts = {node.output[0]: node.input[0] for node in part.graph.node if node.op_type == "Cast"}
        assert all(casts[name].startswith("intermediate.") for name in adds.input), "what the first norm adds up"


@pytest.mark.slow
def test_a_choice_that_later_layers_share_is_handed_on(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "checkpoint", "glm5-tiny")
    export(tmp_path / "checkpoint", tmp_path / "program", numerics=EXACT)
    parts, places = check_stages(tmp_path / "program", 1)
    assert len(places) == 5, "both streams in two places in turns, and the choice, which both full layers use in turns"
    choosing, sharing, again = parts[1], parts[2], parts[3]
    given = {value.name: value.type.tensor_type.elem_type for value in choosing.graph.output}
    (place,) = [name for name, kind in given.items() if "intermediate" in name and kind == onnx.TensorProto.INT32]
    assert "topk_indices.1" in given, "it is shown as well"
    for part in (sharing, again):
        assert place.replace("_out", "") in {value.name for value in part.graph.input}
        assert not any("index" in value.name for value in part.graph.input if "cache" in value.name)


def check_stages(folder: Path, layers_per_stage: int) -> tuple[list[onnx.ModelProto], set[str]]:
    """Cut a program, run whole and parts, and return the parts and the places that values are handed on in."""
    program = load_program(folder)
    config = ModelConfig.parse(program.config, "test")
    whole = onnx.load(folder / "model.onnx")
    ranges = stage_ranges(program.layer_range, layers_per_stage)
    parts = cut(whole, ranges)

    def ready(model: onnx.ModelProto) -> onnx.ModelProto:
        made = specialize(model, CPU, config)
        attach(made, CPU)
        onnx.checker.check_model(made, full_check=True)
        return made

    complete = ready(whole)
    feeds = feeds_of(complete, np.random.default_rng(1))
    expected = run(complete, feeds)
    found: dict[str, np.ndarray] = {}
    handed: dict[str, np.ndarray] = {}
    for part in parts:
        results = run(ready(part), feeds | handed)
        handed |= {name.replace("_out", ""): v for name, v in results.items() if name.startswith("intermediate_out")}
        found |= {name: value for name, value in results.items() if not name.startswith("intermediate_out")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] == value).all(), name
    assert sum(len(part.graph.node) for part in parts) >= len(whole.graph.node)
    read = [name for part in parts for name in (value.name for value in part.graph.input) if "layers." in name]
    assert len(read) == len(set(read)), "no layer is in two stages"
    places = {name.replace("_out", "") for part in parts for name in (v.name for v in part.graph.output)}
    return parts, {name for name in places if name.startswith("intermediate")}


def test_a_wide_cast_of_a_narrow_value_is_made_again_where_it_is_read() -> None:
    """Handed over is the bf16 value; where the cast is the narrower one, that is."""
    bf16, f32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    for wide, narrow, handed in ((f32, bf16, bf16), (bf16, f32, bf16)):
        nodes = [
            node("Mul", ["x", "layers.0.a.weight"], ["made"]),
            node("Cast", ["made"], ["cast"], to=wide),
            node("Mul", ["cast", "layers.1.a.weight"], ["y"]),
        ]
        inputs = [
            value("x", narrow, [4]),
            value("layers.0.a.weight", narrow, [4]),
            value("layers.1.a.weight", wide, [4]),
        ]
        known = [value("made", narrow, [4]), value("cast", wide, [4])]
        graph = onnx.helper.make_graph(nodes, "g", inputs, [value("y", wide, [4])], value_info=known)
        first, second = cut(onnx.helper.make_model(graph), [(0, 1), (1, 2)])
        (given,) = first.graph.output
        assert given.name == "intermediate_out.0" and given.type.tensor_type.elem_type == handed
        assert [one.op_type for one in second.graph.node] == (["Cast", "Mul"] if handed == narrow else ["Mul"])
        onnx.checker.check_model(first, full_check=True)
        onnx.checker.check_model(second, full_check=True)


def test_a_value_of_unknown_type_is_named(tiny_programs: dict[str, Path]) -> None:
    whole = onnx.load(tiny_programs["exact"] / "model.onnx")
    del whole.graph.value_info[:]
    with pytest.raises(ProgramError, match=r"the type of 'layers\.1/.*' between two layers is not known"):
        cut(whole, [(0, 2), (2, 4)])
