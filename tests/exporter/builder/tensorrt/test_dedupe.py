"""Layers that differ in names alone are found to, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from seekforge.common.errors import ProgramError
from seekforge.exporter.builder.tensorrt.dedupe import form_of
from seekforge.exporter.program.stages import cut, stage_ranges
from seekforge.formats.program import load_program


@pytest.fixture(scope="module")
def stages(tiny_programs: dict[str, Path]) -> list[onnx.ModelProto]:
    program = load_program(tiny_programs["fp8"])
    return cut(onnx.load(tiny_programs["fp8"] / "model.onnx"), stage_ranges(program.layer_range, 1))


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """Return a graph with other names, its nodes without any."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names[value.name]
    for node in graph.node:
        node.name = ""
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for values in (graph.initializer, graph.value_info):
        ordered = sorted(values, key=lambda value: value.name)
        del values[:]
        values.extend(ordered)
    return result


def test_the_layers_of_one_kind_are_alike_and_their_names_correspond(stages: list[onnx.ModelProto]) -> None:
    """A dense layer with the embedding, two MoE layers, an MoE layer with the head."""
    forms = [form_of(stage) for stage in stages]
    first, one, other, last = forms
    assert one.digest == other.digest and len({first.digest, one.digest, last.digest}) == 3
    names = dict(zip(one.names, other.names, strict=True))
    assert names["layers.1.mlp.gate.weight"] == "layers.2.mlp.gate.weight" and names["input_ids"] == "input_ids"
    assert renamed(stages[1], names) == renamed(stages[2], {name: name for name in other.names})


def _attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "DsaAttention")
    node.attribute[0].f += 1.0


def _type(model: onnx.ModelProto) -> None:
    model.graph.input[-1].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def _shape(model: onnx.ModelProto) -> None:
    model.graph.input[-1].type.tensor_type.shape.dim[0].dim_value += 1


def _wiring(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Add")
    node.input[:] = [node.input[1], node.input[1]]


def _constant(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = bytes(255 - byte for byte in tensor.raw_data)


def _outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output.pop(0))


@pytest.mark.parametrize("edit", [_attribute, _type, _shape, _wiring, _constant, _outputs])
def test_any_other_difference_is_seen(stages: list[onnx.ModelProto], edit: Callable[[onnx.ModelProto], None]) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(stages[1])
    assert form_of(other).digest == form_of(stages[1]).digest
    edit(other)
    assert form_of(other).digest != form_of(stages[1]).digest


def test_what_is_marked_is_part_of_the_form(stages: list[onnx.ModelProto]) -> None:
    one, other = stages[1:3]
    gate, norm = "layers.{}.mlp.gate.weight", "layers.{}.input_layernorm.weight"
    assert form_of(one, [gate.format(1)]).digest == form_of(other, [gate.format(2)]).digest
    assert form_of(one, [gate.format(1)]).digest != form_of(other, [norm.format(2)]).digest
    assert form_of(one, [gate.format(1)]).digest != form_of(one).digest


def test_a_subgraph_is_refused() -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], name="layers.0/If", then_branch=body, else_branch=body)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(ProgramError, match=r"If 'layers\.0/If' has a subgraph"):
        form_of(model)
