"""Linears of one value as one: the same numbers, weights and names, and where they stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from seekforge.exporter.builder.tensorrt.check import Inputs, open_inputs
from seekforge.exporter.builder.tensorrt.diagnostics import place
from seekforge.exporter.builder.tensorrt.passes.join_linears import join_linears
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.weight_recipes import evaluate
from seekforge.plugins.block_fp8_linear.reference import block_fp8_linear
from seekforge.plugins.testing import Draw, equal_bits

JOINED = "layers.{}.self_attn.q_b_proj_wq_b"
APART = ("layers.{}.self_attn.q_b_proj", "layers.{}.self_attn.indexer.wq_b")


@pytest.fixture(scope="module")
def apart(tiny_programs: dict[str, Path], tiny_checkpoint: Path) -> Inputs:
    return open_inputs(tiny_programs["fp8"], tiny_checkpoint, joins=False)


@pytest.fixture(scope="module")
def joined(tiny_programs: dict[str, Path], tiny_checkpoint: Path) -> Inputs:
    return open_inputs(tiny_programs["fp8"], tiny_checkpoint)


@pytest.fixture(scope="module")
def tiny_glm(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A model some of whose layers take the keys of an earlier one."""
    folder = tmp_path_factory.mktemp("glm")
    new_checkpoint(folder / "checkpoint", "glm5-tiny")
    export(folder / "checkpoint", folder / "program", numerics=NUMERICS["fp8"])
    return open_inputs(folder / "program", None)


def linears(graph: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.input[1]: node for node in graph.graph.node if node.op_type == "BlockFp8Linear"}


def test_each_layer_has_one_linear_less(apart: Inputs, joined: Inputs) -> None:
    layers = {"model": range(4), "mtp": range(4, 5)}
    for name, numbers in layers.items():
        before, after = linears(apart.graphs[name]), linears(joined.graphs[name])
        gone = {f"{one.format(layer)}.weight" for one in APART for layer in numbers}
        new = {f"{JOINED.format(layer)}.weight" for layer in numbers}
        assert after.keys() == before.keys() - gone | new and gone <= before.keys()
        io = joined.program.graphs[name]
        assert [spec.name for spec in io.inputs] == [value.name for value in joined.graphs[name].graph.input]
        assert {spec.role for spec in io.inputs if "q_b_proj_wq_b" in spec.name} == {"weight"}
        weights = {spec.name for spec in io.inputs if spec.role in ("weight", "table")}
        assert weights == joined.bindings[name].keys()
    use = joined.program.ops["BlockFp8Linear"]
    assert use.num_nodes == sum(len(linears(graph)) for graph in joined.graphs.values())


def test_the_joined_weight_gives_what_both_gave(apart: Inputs, joined: Inputs, tiny_checkpoint: Path) -> None:
    x = Draw(0).normal(3, apart.config.q_lora_rank).bfloat16()
    with Checkpoint.open(tiny_checkpoint) as source:

        def product(inputs: Inputs, module: str) -> torch.Tensor:
            recipes = inputs.bindings["model"]
            weight, scale = (evaluate(recipes[f"{module}.{ending}"], source) for ending in ("weight", "weight_scale"))
            codes = torch.from_numpy(np.array(weight).view(np.uint8)).view(torch.float8_e4m3fn)
            return block_fp8_linear(x, codes, torch.from_numpy(np.array(scale)), "ue8m0")

        both = product(joined, JOINED.format(1))
        parts = [product(apart, one.format(1)) for one in APART]
    assert equal_bits(both, torch.cat(parts, -1))
    node = next(one for one in joined.graphs["model"].graph.node if one.name == f"{JOINED.format(1)}/Split")
    constants = {one.name: numpy_helper.to_array(one) for one in joined.graphs["model"].graph.initializer}
    assert constants[node.input[1]].tolist() == [part.shape[-1] for part in parts]
    given = [linears(apart.graphs["model"])[f"{one.format(1)}.weight"].output[0] for one in APART]
    assert list(node.output) == given, "readers are told nothing"


def test_what_files_have_is_not_changed(apart: Inputs) -> None:
    before = apart.graphs["model"].SerializeToString(deterministic=True)
    join_linears(apart.program, apart.graphs, apart.bindings, apart.config)
    assert apart.graphs["model"].SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "fault",
    [
        "another value",
        "no whole block",
        "another rounding",
        "one scale of both",
        "a scale that is computed",
        "a weight that another reads",
    ],
)
def test_what_is_not_alike_stays_apart(apart: Inputs, fault: str) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(apart.graphs["model"])
    first, second = (linears(graph)[f"{one.format(0)}.weight"] for one in APART)
    if fault == "another value":
        second.input[0] = "hidden"
    elif fault == "another rounding":
        next(one for one in second.attribute if one.name == "act_quant").s = b"none"
    elif fault == "one scale of both":
        second.input[2] = first.input[2]
    elif fault == "a scale that is computed":
        second.input[2] = "computed"
    elif fault == "a weight that another reads":
        graph.graph.node.append(onnx.helper.make_node("Identity", [first.input[1]], ["more"], "more"))
    else:
        value = next(one for one in graph.graph.input if one.name == first.input[1])
        value.type.tensor_type.shape.dim[0].dim_value -= 64
    _, made, _ = join_linears(apart.program, {"model": graph}, apart.bindings, apart.config)
    found = linears(made["model"]).keys()
    assert {f"{one.format(0)}.weight" for one in APART} <= found
    assert f"{JOINED.format(1)}.weight" in found


def test_a_layer_without_an_indexer_has_nothing_to_join(tiny_glm: Inputs) -> None:
    config = tiny_glm.config
    names = linears(tiny_glm.graphs["model"]).keys()
    assert not all(map(config.has_indexer, range(config.num_hidden_layers)))
    for layer in range(config.num_hidden_layers):
        assert (f"{JOINED.format(layer)}.weight" in names) is config.has_indexer(layer)


def test_messages_have_words_for_it() -> None:
    found = place(f"{JOINED.format(3)}/BlockFp8Linear")
    assert found is not None
    assert "projection from the query latent to heads and the indexer's query projection" in found
