"""Write the composite operators of a traced graph as core ones, node by node, as the converter to ONNX wants them.

torch's converter has the graph decomposed, which traces all of it a second time under fake tensors: half of an export.
Of a step only casts, views, transposes and halves are composite, and what they need stands in the graph already. Then
it runs the graph a third time, to cast operands of several types to one; a step has no such operands, and a graph that
has is refused here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from seekforge.common.errors import ProgramError

_aten = torch.ops.aten
_VIEWS = (_aten.flatten.using_ints, _aten.reshape.default, _aten.unflatten.int, _aten.view_as.default)
#: What tracing notes for itself; the converter drops it.
_ASSERTIONS = (
    _aten.sym_constrain_range_for_size.default,
    _aten._assert_async.default,
    _aten._assert_async.msg,
    _aten._assert_scalar.default,
    _aten._assert_tensor_metadata.default,
)
#: Operators whose operands, and whose result, are of one type in ONNX.
_ONE_TYPE = frozenset((
    "add", "sub", "rsub", "mul", "div", "pow", "exp", "log", "sqrt", "rsqrt", "sigmoid", "silu", "relu", "neg", "abs",
    "maximum", "minimum", "clamp", "clamp_min", "sum", "mean", "mm", "bmm", "matmul", "cat",
))  # fmt: skip
#: Operators whose operands are of one type, whatever their result is.
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))


class LoweredProgram(ExportedProgram):
    """A traced program in which nothing is left to decompose, to promote or to drop."""

    def run_decompositions(self, *_: Any, **__: Any) -> LoweredProgram:
        """Return the program itself. What an operator without a translation is called, the converter says."""
        vars(self.graph_module)["modules"] = _nothing_to_change
        return self


def _nothing_to_change() -> Iterator[torch.nn.Module]:
    """Stand for `Module.modules` of a lowered graph, over which the converter's passes go that change a graph."""
    return iter(())


def lower(exported: ExportedProgram) -> LoweredProgram:
    """Return `exported` with core operators for composite ones; its graph is changed in place.

    Raises:
        ProgramError: a view has a size that is neither a number, an axis nor a product of axes, or operands of an
            operator have several types.
    """
    graph = exported.graph
    sizes = _Sizes(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
            continue
        _check_types(node)
        _lower(graph, node, sizes)
    return LoweredProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _lower(graph: Graph, node: Node, sizes: _Sizes) -> None:
    if node.target is _aten.to.dtype:
        source, dtype = node.args[:2]
        assert isinstance(source, Node)
        if source.meta["val"].dtype == dtype:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        else:
            _become(node, _aten._to_copy.default, source, dtype=dtype)
    elif node.target in _VIEWS:
        source, shape = node.args[:2]
        assert isinstance(source, Node)
        spread = not source.meta["val"].is_contiguous()
        if spread or node.target is not _aten.reshape.default:
            shape = [sizes.argument(size) for size in node.meta["val"].shape]
        if spread:
            with graph.inserting_before(node):
                copy = graph.call_function(_aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
            copy.meta["val"], source = source.meta["val"], copy
        _become(node, _aten.view.default, source, shape)
    elif node.target is _aten.numpy_T.default:
        _become(node, _aten.permute.default, node.args[0], list(reversed(range(node.meta["val"].dim()))))
    elif node.target is _aten.chunk.default:
        source, dim = node.args[0], node.args[2] if len(node.args) > 2 else 0
        _become(node, _aten.split.Tensor, source, node.meta["val"][0].shape[dim], dim)


def _check_types(node: Node) -> None:
    """Refuse an operator that PyTorch would promote operands of; a number among them takes the type of the tensors."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    if packet is None or not str(packet).startswith("aten.") or name not in _ONE_TYPE | _COMPARISONS:
        return
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    if name in _ONE_TYPE:
        values.append(node.meta["val"])
    types = sorted({str(value.dtype) for value in values if isinstance(value, torch.Tensor)})
    if len(types) > 1:
        raise ProgramError(f"lower: {node.target} has {' and '.join(types)}, expected one type; cast one of them")


def _become(node: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Make `node` a call of another operator that has the same result."""
    node.target, node.args, node.kwargs = target, args, kwargs


def _axis(sym_size: Node) -> int:
    axis = sym_size.args[1]
    assert isinstance(axis, int)
    return axis


class _Sizes:
    """The nodes of a graph that give its symbolic sizes; they stand before all that compute."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: dict[sympy.Expr, Node] = {}
        for node in graph.find_nodes(op="call_function", target=_aten.sym_size.int):
            self._nodes.setdefault(node.meta["val"].node.expr, node)

    def argument(self, size: int | torch.SymInt) -> int | Node:
        """Return what an operator takes as `size`.

        Raises:
            ProgramError: it is neither a number, nor an axis whose size the graph knows, nor a product of two such.
        """
        if isinstance(size, int):
            return size
        wanted = size.node.expr
        if wanted not in self._nodes:
            factors = [self._nodes[factor] for factor in wanted.args if factor in self._nodes]
            if not wanted.is_Mul or len(factors) != len(wanted.args) or len(factors) != 2:
                raise ProgramError(f"lower: a view has the size {wanted}, expected an axis or a product of two axes")
            factors.sort(key=_axis)  # as a tensor has them, outermost first
            with self._graph.inserting_after(list(self._nodes.values())[-1]):
                node = self._graph.call_function(operator.mul, tuple(factors))
            node.meta["val"] = size
            self._nodes[wanted] = node
        return self._nodes[wanted]
