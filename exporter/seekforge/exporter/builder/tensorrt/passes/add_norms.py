"""Norms whose results FP8 linears read, as one operator with what is added before and quantized behind them.

A program has them in standard operators: the two streams cast to f32 and added, the norm, both results cast back; and
each linear quantizes its rows for itself. `AddRmsNormQuantize` takes the place of all that, and each of the linears
gets its codes and scales. Values keep their names, so whoever else reads them, or shows them, finds them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from seekforge.exporter.builder.tensorrt.passes.nodes import casts, import_domain, readers_of, set_nodes, widens
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.plugins.add_rms_norm_quantize.launch import MOST
from seekforge.plugins.add_rms_norm_quantize.spec import SPEC
from seekforge.plugins.block_fp8_linear.spec import SPEC as LINEAR
from seekforge.plugins.functions.attach import read_attrs
from seekforge.plugins.moe_experts.spec import SPEC as MOE_EXPERTS
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN

#: Operators whose rows may be quantized already: they get codes and scales behind their other inputs.
_READERS = {spec.name: len(spec.inputs) for spec in (LINEAR, MOE_EXPERTS)}


@dataclass(frozen=True)
class Norm:
    """A norm that can be one operator.

    Attributes:
        node: the `RMSNormalization`.
        x, residual: what it norms, in the type of activations; residual is empty where nothing is added.
        weight: the graph input with its weight.
        width: values of a row.
        y: its result in the type of activations.
        total: the sum in that type, or empty where nobody reads it.
        add: the `Add` before it, or None.
        readers: linears and experts that read the result, each with what lies between: nothing, or a reshape to rows.
    """

    node: onnx.NodeProto
    x: str
    residual: str
    weight: str
    width: int
    y: str
    total: str
    add: onnx.NodeProto | None
    readers: tuple[tuple[onnx.NodeProto, onnx.NodeProto | None], ...]


class _Graph:
    """A graph, looked through once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.inputs = {value.name: value for value in graph.input}
        self.results = {value.name for value in graph.output}
        self.constants = {one.name: one for one in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = readers_of(graph)

    def narrow(self, name: str) -> str:
        """Return what a value in f32 is the cast of, or nothing."""
        node = self.makers.get(name)
        return node.input[0] if node is not None and widens(node) else ""

    def norm(self, node: onnx.NodeProto) -> Norm | None:
        """Return what becomes of an `RMSNormalization`, or None where its surroundings are others."""
        name, weight = node.input[0], node.input[1]
        weight = weight if weight in self.inputs else self.narrow(weight)
        if weight not in self.inputs or read_attrs(node).get("axis", -1) != -1:
            return None
        width = self.inputs[weight].type.tensor_type.shape.dim[0].dim_value
        if width % FP8_BLOCK or not 0 < width <= MOST:
            return None
        add, total, streams = self.makers.get(name), "", [self.narrow(name)]
        if add is not None and add.op_type == "Add":
            streams = [self.narrow(one) for one in add.input]
            others = [one for one in self.readers[name] if one is not node]
            if name in self.results or not all(casts(one, TensorProto.BFLOAT16) for one in others) or len(others) > 1:
                return None
            total = others[0].output[0] if others else ""
        else:
            add = None
        rounded = self.readers.get(node.output[0], [])
        if not all(streams) or len(rounded) != 1 or not casts(rounded[0], TensorProto.BFLOAT16):
            return None
        y = rounded[0].output[0]
        quantizing = tuple(self._quantizing(y, width))
        if not any(reader.op_type == LINEAR.name for reader, _ in quantizing):
            return None
        residual = streams[1] if add is not None else ""
        return Norm(node, streams[0], residual, weight, width, y, total, add, quantizing)

    def _quantizing(self, y: str, width: int) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto | None]]:
        for reader in self.readers.get(y, []):
            if reader.op_type == "Reshape" and self._to_rows(reader, width):
                yield from ((one, reader) for one in self.readers.get(reader.output[0], []) if _quantizes(one, reader))
            elif _quantizes(reader, None, y):
                yield reader, None

    def _to_rows(self, node: onnx.NodeProto, width: int) -> bool:
        shape = self.constants.get(node.input[1])
        return shape is not None and numpy_helper.to_array(shape).tolist() == [-1, width]


def fusible_norms(model: onnx.ModelProto) -> list[Norm]:
    """Return the norms of a graph that can be one operator.

    Args:
        model: canonical, or specialized with bf16 activations.
    """
    graph = _Graph(model)
    norms = (graph.norm(node) for node in model.graph.node if node.op_type == "RMSNormalization")
    return [norm for norm in norms if norm is not None]


def use_norms(model: onnx.ModelProto, *, readers: Collection[str]) -> None:
    """Put `AddRmsNormQuantize` in place of norms, and give its codes to those that quantize rows; changed in place.

    Args:
        model: specialized graph whose norms have f32 weights (`graph.widen_weights`).
        readers: op_types that take quantized rows: plugins, for nothing else does.
    """
    norms = [norm for norm in fusible_norms(model) if norm.node.input[1] == norm.weight]
    if not norms:
        return
    placed = {(norm.add or norm.node).output[0]: norm for norm in norms}
    replaced = {name for norm in norms for name in (norm.y, norm.total, norm.node.output[0]) if name}
    reshapes: dict[str, Norm] = {}
    for norm in norms:
        for reader, reshape in norm.readers:
            if reader.op_type not in readers:
                continue
            last = f".{reshape.output[0]}" if reshape is not None else ""
            reader.input.extend([f"{_name(norm)}.codes{last}", f"{_name(norm)}.scale{last}"])
            if reshape is not None:
                reshapes[reshape.output[0]] = norm
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        output = node.output[0]
        if output in placed:
            nodes.append(_node(placed[output]))
        elif output not in replaced:
            nodes.append(node)
        if output in reshapes:
            nodes += _reshapes(reshapes[output], output)
    set_nodes(graph, nodes, unread=("Cast",))
    widths = {size for norm in reshapes.values() for size in _widths(norm)}
    graph.initializer.extend(numpy_helper.from_array(np.array([-1, n], np.int64), _rows(n)) for n in sorted(widths))
    import_domain(model)


def _name(norm: Norm) -> str:
    return f"{norm.weight.removesuffix('.weight')}/{SPEC.name}"


def _widths(norm: Norm) -> tuple[int, int]:
    """Return how many words of codes and how many scales a row has."""
    return norm.width // 4, norm.width // FP8_BLOCK


def _rows(width: int) -> str:
    return f"rows.{width}"


def _node(norm: Norm) -> onnx.NodeProto:
    name = _name(norm)
    return helper.make_node(
        SPEC.name,
        [norm.x, norm.weight, *([norm.residual] if norm.residual else [])],
        [norm.total or f"{name}.total", norm.y, f"{name}.codes", f"{name}.scale"],
        name=name,
        domain=DOMAIN,
        epsilon=read_attrs(norm.node).get("epsilon", 1e-5),
        **{PLUGIN_NAMESPACE: DOMAIN},
    )


def _reshapes(norm: Norm, output: str) -> Iterator[onnx.NodeProto]:
    """Yield what makes rows of codes and scales, as of the result itself."""
    for what, width in zip(("codes", "scale"), _widths(norm), strict=True):
        value = f"{_name(norm)}.{what}"
        made = f"{value}.{output}"
        yield helper.make_node("Reshape", [value, _rows(width)], [made], name=f"{_name(norm)}/{what}")


def _quantizes(node: onnx.NodeProto, reshape: onnx.NodeProto | None, y: str = "") -> bool:
    """Whether a node quantizes a value as its rows, and has not been given them quantized yet."""
    value = y if reshape is None else reshape.output[0]
    return (
        node.domain == DOMAIN
        and len(node.input) == _READERS.get(node.op_type)
        and node.input[0] == value
        and read_attrs(node)["act_quant"] == "ue8m0"
    )
