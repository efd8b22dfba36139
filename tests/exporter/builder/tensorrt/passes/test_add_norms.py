"""Norms as one operator: where a build puts it, who reads what, and where a graph stays as it is."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, numpy_helper
from tests.support.prepared_graph import prepared

from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs, open_inputs
from seekforge.exporter.builder.tensorrt.passes.add_norms import fusible_norms, use_norms
from seekforge.exporter.program.stages import cut
from seekforge.plugins.registry import SPECS

OP = "AddRmsNormQuantize"


def norms(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.input[1].removesuffix(".weight"): node for node in model.graph.node if node.op_type == OP}


def test_every_norm_before_fp8_linears_is_one_node(inputs: Inputs, planned: GpuBuild) -> None:
    found = norms(prepared(inputs, planned, inputs.graphs["model"]).model)
    kinds = ("input_layernorm", "self_attn.q_a_layernorm", "post_attention_layernorm")
    assert found.keys() == {f"layers.{layer}.{kind}" for layer in range(4) for kind in kinds}
    adds = {name for name, node in found.items() if len(node.input) == 3}
    assert adds == {name for name in found if "self_attn" not in name} - {"layers.0.input_layernorm"}
    assert inputs.ops[OP] == len(found) + len(norms(prepared(inputs, planned, inputs.graphs["mtp"], name="mtp").model))


def test_each_linear_that_reads_a_norm_gets_its_codes(inputs: Inputs, planned: GpuBuild) -> None:
    model = prepared(inputs, planned, inputs.graphs["model"]).model
    makers = {name: node for node in model.graph.node for name in node.output}
    rows = {one.name: numpy_helper.to_array(one).tolist() for one in model.graph.initializer}
    linears = {n.input[1]: n for n in model.graph.node if n.op_type == "BlockFp8Linear"}
    quantized = {name for name, node in linears.items() if len(node.input) == 5}
    apart = ("o_proj", "down_proj")
    assert quantized == {name for name in linears if name.split(".")[-2] not in apart} and quantized
    for name in quantized:
        x, _, _, codes, scale = (makers.get(one) for one in linears[name].input)
        assert x is not None and codes is not None and scale is not None
        if codes.op_type == "Reshape":  # experts take rows of tokens
            assert x.op_type == "Reshape" and rows[codes.input[1]] == [-1, 128] and rows[scale.input[1]] == [-1, 4]
            x, codes, scale = (makers[one.input[0]] for one in (x, codes, scale))
        assert x is codes is scale and x.op_type == OP
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    for node in model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)


def test_a_plan_of_one_layer_has_its_first_norm_too(inputs: Inputs, planned: GpuBuild) -> None:
    for layer, graph in enumerate(cut(inputs.graphs["model"], [(i, i + 1) for i in range(4)])):
        found = norms(prepared(inputs, planned, graph).model)
        assert len(found) == 3
        given = {value.name: value.type.tensor_type.elem_type for value in graph.graph.input}
        streams = [name for name in found[f"layers.{layer}.input_layernorm"].input if name.startswith("intermediate")]
        assert len(streams) == (2 if layer else 0)
        assert all(given[name] == TensorProto.BFLOAT16 for name in streams)


def test_taps_see_what_they_saw(inputs: Inputs, planned: GpuBuild) -> None:
    apart = open_inputs(inputs.folder, None, joins=False)
    model = prepared(apart, planned, apart.graphs["model"], taps=True).model
    made = {name for node in model.graph.node for name in node.output}
    assert {"attn_norm.1", "mlp_norm.0", "q_a_norm.2", "residual.3", "hidden_states.2", "attn_out.1"} <= made
    assert len(norms(model)) == 12


def edited(inputs: Inputs, change: str) -> onnx.ModelProto:
    """Return the canonical graph with one thing about layer 1's second norm changed."""
    graph = onnx.ModelProto()
    graph.CopyFrom(inputs.graphs["model"])
    norm = next(one for one in fusible_norms(graph) if one.weight == "layers.1.post_attention_layernorm.weight")
    match change:
        case "another reads the f32 sum":
            graph.graph.node.append(onnx.helper.make_node("Abs", [norm.node.input[0]], ["more"], "more"))
        case "the norm is read unrounded":
            graph.graph.node.append(onnx.helper.make_node("Abs", [norm.node.output[0]], ["more"], "more"))
        case "a stream is no bf16":
            cast = next(n for n in graph.graph.node if norm.add is not None and n.output[0] == norm.add.input[0])
            cast.op_type = "Abs"
            del cast.attribute[:]
        case "another axis":
            next(one for one in norm.node.attribute if one.name == "axis").i = 1
        case "rows of another form":
            for reader, reshape in norm.readers:
                assert reshape is not None, reader.name
                reshape.input[1] = "step/Concat"
    return graph


@pytest.mark.parametrize(
    "change",
    [
        "another reads the f32 sum",
        "the norm is read unrounded",
        "a stream is no bf16",
        "another axis",
        "rows of another form",
    ],
)
def test_what_is_another_pattern_stays(inputs: Inputs, change: str) -> None:
    graph = edited(inputs, change)
    weights = {norm.weight for norm in fusible_norms(graph)}
    assert len(weights) == 11 and "layers.1.post_attention_layernorm.weight" not in weights


def test_a_graph_without_such_norms_is_left_alone(inputs: Inputs) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(inputs.graphs["model"])
    for node in graph.graph.node:
        if node.op_type == "RMSNormalization":
            node.op_type = "Other"
    before = graph.SerializeToString(deterministic=True)
    use_norms(graph, readers=SPECS)
    assert graph.SerializeToString(deterministic=True) == before
