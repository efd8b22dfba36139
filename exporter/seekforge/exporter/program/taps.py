"""Taps: the tensors inside a layer that a parity check looks at, found in a graph by its structure.

`build` gives each of them a name of its own (`attn_out.3`), which costs nothing and changes nothing. An engine built
with `--taps` also gives them as outputs; `parity/engine_copy.py` adds them to an engine that was built without.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

from seekforge.common.errors import ProgramError
from seekforge.exporter.models import FAMILIES, family_of, load_family
from seekforge.exporter.program.graph_io import tensor_spec
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import TensorSpec
from seekforge.formats.step_io import INTERMEDIATE_TENSORS
from seekforge.plugins.functions.attach import operator_of
from seekforge.plugins.operator import DOMAIN, NO_TAPS

#: Taps that every engine gives.
SELECTIONS = ("topk_indices", "expert_ids")

_WEIGHT = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_FAMILIES = [load_family(name).taps for name in FAMILIES]
#: What the families' taps are together: a point means the same wherever there is one.
_LINEARS = {module: points for taps in _FAMILIES for module, points in taps.linears.items()}
_MOE = {point for taps in _FAMILIES for point in taps.moe}
_PER_HEAD = {point for taps in _FAMILIES for point in taps.per_head}
_ENTRY_NORMS = {taps.entry_norm for taps in _FAMILIES}
_FINAL_NORMS = {taps.final_norm for taps in _FAMILIES}


def layer_points(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """Return the tap points of a layer in the order of data, without its selections."""
    taps = family_of(config).taps
    return (*INTERMEDIATE_TENSORS, *taps.attention, *(taps.moe if config.is_moe_layer(layer) else taps.dense))


def point_width(config: ModelConfig, point: str) -> int:
    """Return how many values a point has per token, for estimates of memory."""
    return family_of(config).taps.width(config, point)


def name_taps(model: onnx.ModelProto) -> list[str]:
    """Give every tap point of a specialized graph its name, in place; return the names in the order of data.

    Call it while custom operators and weight inputs are still there. Graph inputs and outputs keep their names.

    Raises:
        ProgramError: a layer lacks a point (its structure is not known here).
    """
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    fixed = {value.name for value in (*graph.input, *graph.output)}
    tap_of: dict[str, str] = {}  # value -> tap
    norms: dict[str, onnx.NodeProto] = {}
    norm_point = next(taps.norm for taps in _FAMILIES if taps.norm)
    casts = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Cast"}

    def note(value: str, point: str, layer: int) -> None:
        if value not in fixed:
            tap_of.setdefault(value, f"{point}.{layer}")

    def layer_of(node: onnx.NodeProto) -> int:
        """The layer of a node that reads no weight, by the cache or selection that it touches."""
        for name in (*node.input, *node.output):
            kind, _, number = name.rpartition(".")
            if number.isdigit() and (kind.endswith(("_cache", "_cache_out")) or kind in SELECTIONS):
                return int(number)
            match = re.match(r"layers\.(\d+)\.", name)
            if match:
                return int(match[1])
        raise ProgramError(f"taps: {node.op_type} {node.name!r} belongs to no layer")

    for node in graph.node:
        weights = [producer[name].input[0] if _is_cast(producer.get(name)) else name for name in node.input[1:2]]
        weight = weights[0] if weights else ""
        match = _WEIGHT.fullmatch(weight)
        operator = operator_of(node)
        if operator is not None and operator.taps != NO_TAPS:
            layer = layer_of(node)
            for arg, value in zip(operator.spec.inputs, node.input):
                if arg.name in operator.taps.inputs:
                    note(value, operator.taps.inputs[arg.name], layer)
            for arg, value in zip(operator.spec.outputs, node.output):
                if arg.name in operator.taps.outputs:
                    note(value, operator.taps.outputs[arg.name], layer)
        elif node.domain == DOMAIN and match and match[2] in _LINEARS:
            before, after = _LINEARS[match[2]]
            if before:
                note(node.input[0], before, int(match[1]))
            if after:
                note(node.output[0], after, int(match[1]))
        elif node.op_type == "LayerNormalization" and match:
            note(casts.get(node.output[0], node.output[0]), norm_point, int(match[1]))
        elif node.op_type == "RMSNormalization":
            norms[weight] = node
    layers = sorted(
        {int(m[1]) for m in (re.match(r"latent_cache\.(\d+)$", v.name) for v in graph.input) if m is not None}
    )
    for layer in [*layers, layers[-1] + 1]:
        names = [f"layers.{layer}.{norm}" for norm in _ENTRY_NORMS] if layer in layers else list(_FINAL_NORMS)
        node = next((norms[f"{name}.weight"] for name in names if f"{name}.weight" in norms), None)
        if node is None:
            continue
        total = producer.get(node.input[0])
        pair = [node.input[0]]
        if total is not None and total.op_type == "Add":
            pair = list(total.input)
        for point, value in zip(INTERMEDIATE_TENSORS, pair):
            node = producer.get(value)
            note(node.input[0] if node is not None and _is_cast(node) else value, point, layer)
    _rename(graph, tap_of)
    names = list(tap_of.values())
    for layer in layers:
        shown = {name.partition(".")[0] for name in names if _at(name, layer)}
        missing = min((taps.required - shown for taps in _FAMILIES), key=len)
        if missing:
            raise ProgramError(f"taps: layer {layer} shows no {sorted(missing)[0]}; its graph has another structure")
    return names


def _at(name: str, layer: int) -> bool:
    return name.rpartition(".")[2] == str(layer)


def _is_cast(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "Cast"


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)


def _points() -> set[str]:
    return set(INTERMEDIATE_TENSORS).union(*((*taps.attention, *taps.dense, *taps.moe) for taps in _FAMILIES))


#: A name that `name_taps` gives.
TAP_NAME = re.compile(rf"(?:{'|'.join(sorted(_points()))})\.\d+")


def taps_in(model: onnx.ModelProto) -> list[str]:
    """Return the tap points that a graph has, by name, in the order of its nodes, but for those that are outputs."""
    outputs = {value.name for value in model.graph.output}
    values = (name for node in model.graph.node for name in node.output)
    return [name for name in values if TAP_NAME.fullmatch(name) and name not in outputs]


def expose(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Make tap points outputs of the graph, in place. All are f32 in a graph for ONNX Runtime."""
    known = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for name in names:
        kind = known.get(name) or TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(name, kind, tap_shape(name, names)))


def tap_shape(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Return the symbolic shape of a tap; `names`: the taps that are shown, which tell MoE layers."""
    point, _, layer = name.rpartition(".")
    flat = point in _MOE or (point == "mlp_norm" and f"router_logits.{layer}" in names)
    widths = [f"{name}:{axis}" for axis in range(2 if point in _PER_HEAD else 1)]
    return (*(("T",) if flat else ("B", "Q")), *widths)


def tap_specs(model: onnx.ModelProto, names: Collection[str]) -> tuple[TensorSpec, ...]:
    """Describe exposed taps for a manifest."""
    return tuple(tensor_spec(value, "tap") for value in model.graph.output if value.name in names)
