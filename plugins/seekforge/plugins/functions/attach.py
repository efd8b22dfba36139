"""Attach a reference decomposition in standard operators to every custom node of a model.

Bodies are generated per program, from the attribute values and the specialization: a function cannot branch
on a string, and a parser knows one body per op_type. So all nodes of an operator share their attributes.
"""

from __future__ import annotations

from typing import Final

import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.functions.builder import Attrs
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.native import FUSED
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION, FoldedForm, Operator, OpSpec, load
from seekforge.plugins.registry import OPERATORS, SPECS

#: op_type -> the form for CPUs, whose weights the build folds.
FOLDED_FORMS: Final[dict[str, FoldedForm]] = {
    operator.folded.op_type: operator.folded for operator in OPERATORS.values() if operator.folded is not None
}


def attach(model: onnx.ModelProto, how: Specialization) -> None:
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
    functions: dict[str, onnx.FunctionProto] = {}
    wanted = {op_type: attrs for op_type, (_, attrs) in shared.items()}
    while wanted:
        op_type, attrs = wanted.popitem()
        functions[op_type] = make_body(op_type, attrs, how)
        for node in functions[op_type].node:  # bodies call operators too
            if node.domain == DOMAIN:
                node.attribute.append(onnx.helper.make_attribute(PLUGIN_NAMESPACE, DOMAIN))
                if node.op_type not in functions:
                    wanted[node.op_type] = read_attrs(node)
    others = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*others, *(functions[name] for name in sorted(functions))])
    if functions and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def make_body(op_type: str, attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return the function of one operator, folded forms and fused nodes included.

    Raises:
        ProgramError: the operator is unknown or has no body for these values.
    """
    if op_type in OPERATORS:
        return load(OPERATORS[op_type].body)(attrs, how)
    if op_type in FOLDED_FORMS:
        return load(FOLDED_FORMS[op_type].body)(attrs)
    if op_type in FUSED:
        return load(FUSED[op_type])(attrs)
    raise ProgramError(f"no operator {DOMAIN}.{op_type}; known: {', '.join([*OPERATORS, *FOLDED_FORMS, *FUSED])}")


def operator_of(node: onnx.NodeProto) -> Operator | None:
    """Return the description of a custom node's operator; None for other nodes."""
    return OPERATORS.get(node.op_type) if node.domain == DOMAIN else None


def read_attrs(node: onnx.NodeProto) -> dict[str, int | float | str | bool]:
    """Return a node's attributes as Python values, `plugin_namespace` left out; bools as bools where a spec says so.

    Raises:
        ProgramError: they are not those that the operator's contract lists.
    """
    raw = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != PLUGIN_NAMESPACE}
    attrs = {name: value.decode() if isinstance(value, bytes) else value for name, value in raw.items()}
    spec: OpSpec | None = SPECS.get(node.op_type)
    if spec is None:
        return attrs
    expected = {attr.name: attr for attr in spec.attrs}
    if attrs.keys() != expected.keys():
        raise ProgramError(f"{node.op_type} {node.name!r}: attributes {sorted(attrs)}, expected {sorted(expected)}")
    return {name: bool(value) if expected[name].kind == "bool" else value for name, value in attrs.items()}
