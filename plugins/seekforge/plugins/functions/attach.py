"""Attach a reference decomposition in standard operators to every custom node of a model.

Bodies are generated per program, from the attribute values and the specialisation: a function cannot branch
on a string, and a parser knows one body per op_type. So all nodes of an operator share their attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import onnx

import seekforge.plugins.bf16_linear.function as bf16_linear
import seekforge.plugins.block_fp8_linear.function as block_fp8_linear
import seekforge.plugins.dsa_attention.function as dsa_attention
import seekforge.plugins.dsa_cache_write.function as dsa_cache_write
import seekforge.plugins.dsa_indexer.function as dsa_indexer
import seekforge.plugins.moe_experts.function as moe_experts
import seekforge.plugins.moe_route.function as moe_route
import seekforge.plugins.sum_ranks.function as sum_ranks
from seekforge.common.errors import ProgramError
from seekforge.plugins.functions.builder import Attrs
from seekforge.plugins.functions.specialization import Specialisation
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION, OpSpec
from seekforge.plugins.registry import SPECS

Body = Callable[[Attrs, Specialisation], onnx.FunctionProto]

#: op_type -> what makes its body.
BODIES: Final[dict[str, Body]] = {
    "BlockFp8Linear": block_fp8_linear.body,
    "Bf16Linear": bf16_linear.body,
    "DsaCacheWrite": dsa_cache_write.body,
    "DsaIndexer": dsa_indexer.body,
    "DsaAttention": dsa_attention.body,
    "MoeRoute": moe_route.body,
    "MoeExperts": moe_experts.body,
    "SumRanks": sum_ranks.body,
}
#: op_type of the CPU build's folded forms -> what makes its body.
FOLDED_BODIES: Final[dict[str, Callable[[Attrs], onnx.FunctionProto]]] = {
    block_fp8_linear.FOLDED: block_fp8_linear.folded_body,
    moe_experts.FOLDED: moe_experts.folded_body,
}


def attach(model: onnx.ModelProto, how: Specialisation) -> None:
    """Give every custom operator of the main graph its function, in place of any it had.

    Also writes `plugin_namespace` on each node (TensorRT then prefers a registered plugin) and the opset import.

    Raises:
        ProgramError: an operator is unknown, its nodes differ in an attribute, or it has no body for `how`.
    """
    shared: dict[str, tuple[onnx.NodeProto, Attrs]] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        attrs = read_attrs(node)
        first, expected = shared.setdefault(node.op_type, (node, attrs))
        for name in expected.keys() | attrs.keys():
            if attrs.get(name) != expected.get(name):
                raise ProgramError(
                    f"{node.op_type}: attribute {name} is {attrs.get(name)!r} on node {node.name!r} and "
                    f"{expected.get(name)!r} on {first.name!r}; all nodes of an operator must share one body"
                )
        if not any(attribute.name == PLUGIN_NAMESPACE for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute(PLUGIN_NAMESPACE, DOMAIN))
    functions = [make_body(op_type, attrs, how) for op_type, (_, attrs) in shared.items()]
    others = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*others, *functions])
    if functions and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def make_body(op_type: str, attrs: Attrs, how: Specialisation) -> onnx.FunctionProto:
    """Return the function of one operator, folded forms included.

    Raises:
        ProgramError: the operator is unknown or has no body for these values.
    """
    if op_type in BODIES:
        return BODIES[op_type](attrs, how)
    if op_type in FOLDED_BODIES:
        return FOLDED_BODIES[op_type](attrs)
    raise ProgramError(f"no operator {DOMAIN}.{op_type}; known: {', '.join([*BODIES, *FOLDED_BODIES])}")


def read_attrs(node: onnx.NodeProto) -> dict[str, int | float | str | bool]:
    """Return a node's attributes as Python values, `plugin_namespace` left out; bools as bools where a spec says so.

    Raises:
        ProgramError: they are not those that the operator's contract lists.
    """
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != PLUGIN_NAMESPACE}
    attrs = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    spec: OpSpec | None = SPECS.get(node.op_type)
    if spec is None:
        return attrs
    expected = {attr.name: attr for attr in spec.attrs}
    if attrs.keys() != expected.keys():
        raise ProgramError(f"{node.op_type} {node.name!r}: attributes {sorted(attrs)}, expected {sorted(expected)}")
    return {name: bool(value) if expected[name].kind == "bool" else value for name, value in attrs.items()}
