"""Shared experts as one more expert of `MoeExperts`: two launches, or more, of each layer less.

A program has a shared expert as two linears with SwiGLU between them, and adds its rows, rounded to the type of
activations, to those of the routed experts in f32. `MoeExperts` does that too, behind the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import TensorProto

from seekforge.exporter.builder.tensorrt.passes.nodes import casts, readers_of, set_nodes, widens
from seekforge.plugins.block_fp8_linear.spec import SPEC as LINEAR
from seekforge.plugins.functions.attach import read_attrs
from seekforge.plugins.moe_experts.spec import SPEC, takes_shared
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE

#: Inputs of both operators behind which a node has quantized rows, codes and scales.
_INPUTS, _LINEAR_INPUTS = len(SPEC.inputs), len(LINEAR.inputs)
_ROWS = 2
#: Operators that have to be plugins: norms give quantized rows, and what becomes one node was one of each.
NEEDS: Final = frozenset((ADD_RMS_NORM_QUANTIZE, LINEAR.name, SPEC.name))


@dataclass(frozen=True)
class SharedExpert:
    """A shared expert that can be one more.

    Attributes:
        experts: the routed ones.
        up, down: its linears.
        total: the sum of both.
        inside: the nodes between the linears, and between them and the sum.
    """

    experts: onnx.NodeProto
    up: onnx.NodeProto
    down: onnx.NodeProto
    total: onnx.NodeProto
    inside: tuple[onnx.NodeProto, ...]

    @property
    def hidden(self) -> tuple[onnx.NodeProto, ...]:
        """All nodes whose results nobody sees any more."""
        return (self.experts, self.up, self.down, *self.inside)


def shared_experts(model: onnx.ModelProto) -> list[SharedExpert]:
    """Return the shared experts of a graph that can be one more of the routed ones.

    Args:
        model: canonical, or specialized with bf16 activations.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers, results = readers_of(graph), {value.name for value in graph.output}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    routed = (node for node in graph.node if node.domain == DOMAIN and node.op_type == SPEC.name)
    added = (_added(node, makers, readers) for node in routed)
    return [
        one
        for one in added
        if one is not None and _fits(one, shapes) and results.isdisjoint(n for node in one.hidden for n in node.output)
    ]


def use_shared_experts(model: onnx.ModelProto) -> None:
    """Give each `MoeExperts` the shared expert that is added to it; changed in place.

    Args:
        model: specialized graph. Where norms do not give quantized rows (`add_norms.use_norms`) it stays as it is.
    """
    ready = [one for one in shared_experts(model) if len(one.experts.input) == _INPUTS + _ROWS]
    totals = {one.total.output[0]: one for one in ready}
    gone = {name for one in ready for node in one.hidden for name in node.output}
    nodes = []
    for node in model.graph.node:
        one = totals.get(node.output[0])
        if one is not None:
            one.experts.input.extend([*one.up.input[1:_LINEAR_INPUTS], *one.down.input[1:_LINEAR_INPUTS]])
            one.experts.output[0] = node.output[0]
            nodes.append(one.experts)
        elif node.output[0] not in gone:
            nodes.append(node)
    set_nodes(model.graph, nodes, unread=())


def _added(
    experts: onnx.NodeProto, makers: dict[str, onnx.NodeProto], readers: dict[str, list[onnx.NodeProto]]
) -> SharedExpert | None:
    """Return what is added to a node's result, if that is a shared expert of the same rows, or None."""
    sums = readers.get(experts.output[0], [])
    if len(sums) != 1 or sums[0].op_type != "Add" or list(sums[0].input).count(experts.output[0]) != 1:
        return None
    total = sums[0]
    wide = makers.get(next(name for name in total.input if name != experts.output[0]))
    down = makers.get(wide.input[0]) if wide is not None and widens(wide) else None
    if wide is None or down is None or not _is_linear(down) or len(down.input) != _LINEAR_INPUTS:
        return None
    chain = _swiglu(down.input[0], makers)
    up = makers.get(chain[0].input[0]) if chain else None
    if up is None or not _is_linear(up) or up.input[0] != experts.input[0]:
        return None
    one = SharedExpert(experts, up, down, total, (*chain, wide))
    same_rows = list(up.input[_LINEAR_INPUTS:]) == list(experts.input[_INPUTS : _INPUTS + _ROWS])
    quantized = {read_attrs(node)["act_quant"] for node in (experts, up, down)} == {"ue8m0"}
    ours = {name for node in (*one.hidden, total) for name in node.output}
    read = (reader for node in one.hidden for name in node.output for reader in readers.get(name, ()))
    return one if same_rows and quantized and all(reader.output[0] in ours for reader in read) else None


def _is_linear(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == LINEAR.name


def _swiglu(value: str, makers: dict[str, onnx.NodeProto]) -> tuple[onnx.NodeProto, ...]:
    """Return the nodes of silu(gate) · up in f32 that make a value, the first one, a cast, first; or none."""
    rounded = makers.get(value)
    if not casts(rounded, TensorProto.BFLOAT16) or rounded is None:
        return ()
    product = makers.get(rounded.input[0])
    silu = makers.get(product.input[0]) if product is not None and product.op_type == "Mul" else None
    sigmoid = makers.get(silu.input[1]) if silu is not None and silu.op_type == "Mul" else None
    parts = makers.get(sigmoid.input[0]) if sigmoid is not None and sigmoid.op_type == "Sigmoid" else None
    wide = makers.get(parts.input[0]) if parts is not None and parts.op_type == "Split" else None
    if product is None or silu is None or sigmoid is None or parts is None or wide is None or not widens(wide):
        return ()
    gate, up = parts.output if len(parts.output) == 2 else ("", "")
    is_swiglu = list(silu.input) == [gate, sigmoid.output[0]] and list(product.input) == [silu.output[0], up]
    return (wide, parts, sigmoid, silu, product, rounded) if is_swiglu and sigmoid.input[0] == gate else ()


def _fits(one: SharedExpert, shapes: Mapping[str, list[int]]) -> bool:
    """Whether the weights are graph inputs of a form that kernels take, those of both linears of one expert."""
    routed, linears = SPEC.named(one.experts.input), [LINEAR.named(node.input) for node in (one.up, one.down)]
    names = routed["w13"], routed["w2"], *(each["weight"] for each in linears)
    if not all(name in shapes for name in names):
        return False
    (_, rows, width), (_, hidden, _), up, down = (shapes[name] for name in names)
    is_nvfp4 = width != hidden  # whose rows are shorter
    return not is_nvfp4 and up == [2 * down[1], hidden] and takes_shared(rows // 2, down[1])
