"""The graph that is compiled: its weights in the types that its products read, and what is counted of it."""

from __future__ import annotations

import math
from typing import Literal

import onnx
import pytest
from tests.support.build_options import gpu_options

from seekforge.common.dtypes import itemsize
from seekforge.common.errors import EngineError
from seekforge.exporter.builder.tensorrt import audit
from seekforge.exporter.builder.tensorrt import manifest as gpu_manifest
from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs, check
from seekforge.exporter.builder.tensorrt.diagnostics import place
from seekforge.exporter.builder.tensorrt.graph import prepare, widen_weights
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Share
from seekforge.formats.targets import load_target

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def planned(inputs: Inputs) -> GpuBuild:
    return check(inputs, load_target("rtx4090"), gpu_options())


def test_less_than_was_asked_fails() -> None:
    found = [
        Share(what="BlockFp8Linear", form="inlined", precision="bf16", share=0.6),
        Share(what="MoeExperts", form="plugin", precision="fp8", share=0.4),
    ]
    with pytest.raises(EngineError, match=r"BlockFp8Linear \(inlined\) multiply in bf16: 60%"):
        audit.require_precision(found, "--precision fp8", "fp8")
    audit.require_precision(found, "--precision bf16", "bf16")


def test_the_audit_counts_what_the_sizes_say(inputs: Inputs, planned: GpuBuild) -> None:
    """The FLOPs of the graph's products are those of the formulas, over main model and MTP module."""
    from seekforge.exporter.sizing.flops import attention_flops, linear_flops
    from seekforge.exporter.sizing.matrices import layer_matrices

    config: ModelConfig = inputs.config
    total = 0.0
    for name in inputs.program.graphs:
        ready = prepare(
            onnx.load(inputs.folder / f"{name}.onnx"),
            planned.how,
            config,
            plugins=planned.plugins,
            products="fp8",
            digests={},
            weights=planned.wide[name],
            bf16_linears=planned.bf16_linears[name],
        )
        weights = [spec.name for spec in inputs.program.graphs[name].with_role("weight")]
        found = audit.products(
            ready.operators, config, weights=weights, plugins=planned.plugins, precision="fp8", context=4096
        )
        total += sum(one.flops for one in found)
        head = next(one for one in found if one.what == "lm_head")
        assert (head.form, head.precision) == ("plugin", "bf16")
    expected = linear_flops(config).total + attention_flops(config, 4096).total
    assert config.mtp_layer is not None
    expected += linear_flops(config, layer_matrices(config, config.mtp_layer)).total
    expected += attention_flops(config, 4096, layers=[0]).total + 2.0 * config.vocab_size * config.hidden_size
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("plugins", ["all", "none"])
def test_no_plan_converts_a_weight_in_every_step(inputs: Inputs, plugins: Literal["all", "none"]) -> None:
    """What is only multiplied keeps its two bytes where a plugin multiplies it; all else that is read as f32 is f32,
    and what converts it is the recipe. Memory is counted like that."""
    target = load_target("rtx4090", ["precision=bf16", "kv_format=bf16"])
    planned = check(inputs, target, gpu_options(plugins=plugins))
    for name, graph in inputs.graphs.items():
        wide, linears = planned.wide[name], planned.bf16_linears.get(name, set())
        ready = prepare(
            graph,
            planned.how,
            inputs.config,
            plugins=planned.plugins,
            products="bf16",
            digests={},
            weights=wide,
            bf16_linears=linears,
        )
        types = {value.name: value.type.tensor_type.elem_type for value in ready.model.graph.input}
        converted = {node.input[0] for node in ready.model.graph.node if node.op_type == "Cast"} & types.keys()
        assert not [one for one in converted & inputs.bindings[name].keys() if types[one] == onnx.TensorProto.BFLOAT16]
        assert {one for one in wide if types[one] == onnx.TensorProto.FLOAT} == wide
        multiplied = {"lm_head.weight"} | {
            one for one in types if one.endswith(("mlp.gate.weight", "weights_proj.weight"))
        }
        assert wide & multiplied == (set() if plugins == "all" else multiplied) and "norm.weight" in wide
        assert linears == (multiplied if plugins == "all" else set())
        narrow = {node.input[1]: node.name for node in ready.model.graph.node if node.op_type == "Bf16Linear"}
        assert narrow.keys() == linears and ready.plugins.get("Bf16Linear", 0) == len(linears)
        assert all(types[one] == onnx.TensorProto.BFLOAT16 and place(narrow[one]) for one in linears)
        assert types["embed_tokens.weight"] == onnx.TensorProto.BFLOAT16
    recipes = gpu_manifest.engine_bindings(inputs, planned.how, planned.wide)
    dtype = "bf16" if plugins == "all" else "f32"
    assert {recipes[name]["lm_head.weight"].dtype for name in inputs.graphs} == {dtype}
    whole = check(inputs, target, gpu_options()).device_bytes["weights"]
    more = sum(
        2 * math.prod(map(int, inputs.program.graphs[graph].named(one).shape))
        for graph, names in inputs.bf16_linears.items()
        for one in names - (set() if graph == "model" else {"lm_head.weight"})
    )
    assert planned.device_bytes["weights"] == whole + (0 if plugins == "all" else more)


def test_a_weight_that_something_else_reads_too_keeps_its_type() -> None:
    graph = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 23]>
        g (bfloat16[2] x, bfloat16[2] a, bfloat16[2] b, bfloat16[2] c)
            => (float[2] y, bfloat16[2] z, float[2] u, float[2] v) {
          af = Cast<to = 1>(a)
          bf = Cast<to = 1>(b)
          y = Mul(af, bf)
          z = Add(x, b)
          u = Cast<to = 1>(x)
          v = Cast<to = 1>(c)
        }"""
    )
    graph.graph.node[0].name, graph.graph.node[2].name = "layers.3.mlp.gate/Cast", "layers.3/Mul"
    assert widen_weights(graph, ["a", "b", "c"]) == {"a"}
    assert [node.op_type for node in graph.graph.node] == ["Cast", "Mul", "Add", "Cast", "Cast"]
    product = graph.graph.node[1]
    assert (list(product.input), product.name) == (["a", "bf"], "layers.3.mlp.gate/Mul"), "messages still find it"
    onnx.checker.check_model(graph, full_check=True)


def test_expected_weights_are_those_of_the_planner(inputs: Inputs, planned: GpuBuild) -> None:
    from seekforge.exporter.sizing.matrices import weight_bytes

    tables = {
        spec.name: itemsize(spec.dtype) * math.prod(map(int, spec.shape))
        for graph_io in inputs.program.graphs.values()
        for spec in graph_io.with_role("table")
    }
    expected = weight_bytes(inputs.config, mtp=True) + sum(tables.values())
    assert planned.device_bytes["weights"] == expected
