"""Shared experts as one more of the routed ones: where a build puts them, and what stays apart."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from onnx import helper
from tests.support.build_options import gpu_options
from tests.support.prepared_graph import prepared

from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs, check, open_inputs
from seekforge.exporter.builder.tensorrt.passes.shared_experts import shared_experts
from seekforge.formats.targets import load_target

MOE, LINEAR = "MoeExperts", "BlockFp8Linear"
#: Layers of the model with experts; the first has a dense MLP.
LAYERS = (1, 2, 3)


def experts(model: onnx.ModelProto) -> dict[int, onnx.NodeProto]:
    """Return layer -> its routed experts."""
    return {int(node.input[3].split(".")[1]): node for node in model.graph.node if node.op_type == MOE}


def test_every_shared_expert_is_one_more(inputs: Inputs, planned: GpuBuild) -> None:
    made = prepared(inputs, planned, inputs.graphs["model"])
    makers = {name: node for node in made.model.graph.node for name in node.output}
    for layer, node in experts(made.model).items():
        x, ids, _, *weights = node.input
        assert ids == f"expert_ids.{layer}"
        assert weights[:4] == [f"layers.{layer}.mlp.experts.{name}" for name in ("w13", "w13_scale", "w2", "w2_scale")]
        norm = f"layers.{layer}.post_attention_layernorm/AddRmsNormQuantize"
        rows = [makers[name].input[0] for name in (x, *weights[4:6])]
        assert makers[rows[0]].name == norm and rows[1:] == [f"{norm}.codes", f"{norm}.scale"]
        shared = f"layers.{layer}.mlp.shared_experts"
        assert weights[6:] == [
            f"{shared}.{name}.{ending}"
            for name in ("gate_up_proj", "down_proj")
            for ending in ("weight", "weight_scale")
        ]
        readers = [one for one in made.model.graph.node if node.output[0] in one.input]
        assert [one.op_type for one in readers] == ["Cast"], "rounded once, behind all experts"
    assert tuple(experts(made.model)) == LAYERS
    assert not any("shared_experts" in node.name for node in made.model.graph.node)
    known = {value.name for value in (*made.model.graph.input, *made.model.graph.initializer)} | {""}
    for node in made.model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)


def test_a_plan_counts_the_nodes_of_the_engine(inputs: Inputs, planned: GpuBuild) -> None:
    both = [prepared(inputs, planned, graph, name=name).plugins for name, graph in inputs.graphs.items()]
    for op in planned.plugins:
        assert planned.num_nodes[op] == sum(one.get(op, 0) for one in both), op
    assert inputs.ops[LINEAR] - planned.num_nodes[LINEAR] == 2 * 4


@pytest.mark.parametrize("without", [MOE, LINEAR, "AddRmsNormQuantize"])
def test_a_plan_counts_them_where_an_operator_is_inlined(inputs: Inputs, planned: GpuBuild, without: str) -> None:
    """Codes come from the norms' plugin, and the experts' takes them: without either, all is as in the program."""
    plugins = [op for op in planned.plugins if op != without]
    how = planned.how if MOE in plugins else replace(planned.how, fp8_storage="int8")  # a loop takes no float8
    made = prepared(inputs, planned, inputs.graphs["model"], how=how, plugins=plugins)
    kept = [node for node in made.operators.graph.node if node.op_type == LINEAR and "shared_experts" in node.input[1]]
    assert len(kept) == 2 * len(LAYERS)
    assert all(len(node.input) <= 9 for node in experts(made.operators).values())
    if without == MOE:
        assert all(len(node.input) == 7 for node in experts(made.operators).values())
        assert not experts(made.model), "inlined"


def test_taps_see_the_shared_expert(inputs: Inputs, planned: GpuBuild) -> None:
    made = prepared(inputs, planned, inputs.graphs["model"], taps=True)
    assert {f"{tap}.{layer}" for tap in ("routed", "shared") for layer in LAYERS} <= set(made.taps)
    assert all(len(node.input) == 9 for node in experts(made.model).values())
    assert open_inputs(inputs.folder, None, joins=False).num_shared == 0


def test_beside_experts_in_nvfp4_it_stays_fp8_and_apart(inputs: Inputs, planned: GpuBuild) -> None:
    made = prepared(inputs, planned, inputs.graphs["model"], nvfp4_experts=True)
    assert all(len(node.input) == 9 for node in experts(made.model).values())
    target = load_target("b200").changed(["precision=nvfp4"])
    assert check(inputs, target, gpu_options()).num_nodes[LINEAR] == inputs.ops[LINEAR]


def edited(inputs: Inputs, change: str) -> onnx.ModelProto:
    """Return the canonical graph with one thing about layer 1's shared expert changed."""
    graph = onnx.ModelProto()
    graph.CopyFrom(inputs.graphs["model"])
    one = next(one for one in shared_experts(graph) if "layers.1." in one.experts.input[3])
    named = {node.op_type: node for node in one.inside}
    match change:
        case "another reads its gate":
            graph.graph.node.append(helper.make_node("Abs", [one.up.output[0]], ["more"], "more"))
        case "another reads the routed sum":
            graph.graph.node.append(helper.make_node("Abs", [one.experts.output[0]], ["more"], "more"))
        case "its result is shown":
            graph.graph.output.append(helper.make_empty_tensor_value_info(one.down.output[0]))
        case "other rows":
            one.up.input[0] = "hidden"
        case "another activation":
            named["Sigmoid"].op_type = "Tanh"
        case "up before gate":
            split = named["Split"]
            split.output[0], split.output[1] = split.output[1], split.output[0]
        case "another rounding":
            next(one for one in one.down.attribute if one.name == "act_quant").s = b"none"
        case "subtracted":
            one.total.op_type = "Sub"
        case "added to itself":
            one.total.input[:] = [one.experts.output[0]] * 2
        case "a weight that is computed":
            one.down.input[1] = "computed"
        case "wider than the others":
            for value in graph.graph.input:
                if value.name == one.experts.input[3]:
                    value.type.tensor_type.shape.dim[1].dim_value -= 256
    return graph


@pytest.mark.parametrize(
    "change",
    [
        "another reads its gate",
        "another reads the routed sum",
        "its result is shown",
        "other rows",
        "another activation",
        "up before gate",
        "another rounding",
        "subtracted",
        "added to itself",
        "a weight that is computed",
        "wider than the others",
    ],
)
def test_what_is_another_pattern_stays(inputs: Inputs, change: str) -> None:
    left = {int(one.experts.input[3].split(".")[1]) for one in shared_experts(edited(inputs, change))}
    assert left == {2, 3}
