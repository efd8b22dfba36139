"""Fused pieces of layers: how many nodes a layer has, that no name is lost, and what is left as it is."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

from seekforge.exporter.builder.onnxruntime.fold import WeightFile
from seekforge.exporter.builder.onnxruntime.fuse import fuse
from seekforge.exporter.builder.onnxruntime.graphs import finish_graph, fold_graph
from seekforge.exporter.builder.onnxruntime.quantize import choose
from seekforge.exporter.builder.request import read_graph
from seekforge.exporter.program.taps import taps_in
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import load_bindings, load_program
from seekforge.formats.targets import load_target
from seekforge.plugins.native import FUSED

#: What a layer may have: every node is one kernel of ONNX Runtime, whatever the context is.
MOST_NODES = 30


def folded(program_folder: Path, *settings: str, taps: bool = False) -> onnx.ModelProto:
    """Return the folded main graph of a program for a CPU, its weights constants that lie nowhere."""
    program, bindings = load_program(program_folder), load_bindings(program_folder)
    config = ModelConfig.parse(program.config, "program")
    target = load_target("cpu", [*settings, "limits.max_model_len=512"])
    model, constants = fold_graph(
        read_graph(program_folder, program.graphs["model"]),
        bindings["model"],
        config,
        coded=choose(target, config, bindings),
        limits=target.limits,
        taps=taps,
    )
    WeightFile("weights.bin").attach(model, constants)
    return model


def by_layer(model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """Return the nodes of each layer: from what makes its attn_norm to what makes the next one's."""
    layers: list[list[onnx.NodeProto]] = []
    for node in model.graph.node:
        if any(re.fullmatch(r"attn_norm\.\d+", name) for name in node.output):
            layers.append([])
        if "hidden" in node.output:
            break
        if layers and node.op_type != "Constant":
            layers[-1].append(node)
    return layers


@pytest.mark.parametrize("numerics", ["fp8", "exact"])
@pytest.mark.parametrize(
    "settings", [[], ["precision=int8"], ["precision=int4"], ["precision=int8", "weight_block_size=128"]]
)
def test_a_layer_has_few_nodes(tiny_programs: dict[str, Path], numerics: str, settings: list[str]) -> None:
    finished = finish_graph(folded(tiny_programs[numerics], *settings))
    layers = by_layer(finished)
    assert len(layers) == 4
    for nodes in layers:
        # in f32, products of FP8 numerics have a node before them that rounds
        counted = [node.op_type for node in nodes if node.op_type != "FakeQuantize"]
        assert len(counted) <= MOST_NODES and len(nodes) <= MOST_NODES + 6, counted
        assert {"If", "Scan", "Loop"}.isdisjoint(node.op_type for node in nodes)
    kinds = [node.op_type for nodes in layers[1:] for node in nodes]
    used = {*FUSED, "DsaIndexer"} - {"PlainLatentRows", "HeadMlaAttention", "FakeQuantize"}
    if not settings:
        used = used - {"MoeRouteAll"} | {"FoldedExperts", "MoeRoute"}
    assert {kind: kinds.count(kind) for kind in used} == {kind: 3 + 3 * (kind == "AddRmsNorm") for kind in used}


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make inputs of the weights whose file has not been written."""
    kept = [one for one in model.graph.initializer if one.data_location != onnx.TensorProto.EXTERNAL]
    for one in model.graph.initializer:
        if one.data_location == onnx.TensorProto.EXTERNAL:
            model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_every_tap_and_output_keeps_its_name(tiny_programs: dict[str, Path], precision: str) -> None:
    model = folded(tiny_programs["exact"], f"precision={precision}")
    before, outputs = set(taps_in(model)), [value.name for value in model.graph.output]
    fuse(model)
    assert set(taps_in(model)) == before
    assert [value.name for value in model.graph.output] == outputs
    made = {name for node in model.graph.node for name in node.output}
    assert made.issuperset(outputs)
    onnx.checker.check_model(without_weights(finish_graph(model)))


@pytest.mark.parametrize("numerics", ["fp8", "exact"])
def test_taps_leave_the_same_nodes(tiny_programs: dict[str, Path], numerics: str) -> None:
    plain, tapped = folded(tiny_programs[numerics]), folded(tiny_programs[numerics], taps=True)
    fuse(plain)
    fuse(tapped)
    kinds = [[node.op_type for node in model.graph.node if node.op_type != "Cast"] for model in (plain, tapped)]
    assert sorted(kinds[0]) == sorted(kinds[1])


def test_a_piece_that_looks_otherwise_is_left(tiny_programs: dict[str, Path]) -> None:
    model = folded(tiny_programs["exact"])
    for node in model.graph.node:
        if node.op_type == "Transpose":  # another order of axes: the attention of this layer is another piece
            node.attribute[0].CopyFrom(onnx.helper.make_attribute("perm", [0, 1, 2]))
            break
    fuse(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QueryRows") == 3 and kinds.count("LatentRows") == 4


def test_fused_nodes_are_those_of_the_table(tiny_programs: dict[str, Path]) -> None:
    model = folded(tiny_programs["exact"], "precision=int8")
    fuse(model)
    kinds = {node.op_type for node in model.graph.node if node.domain == "seekforge"}
    assert kinds - {"DsaIndexer"} <= FUSED.keys()
