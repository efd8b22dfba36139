"""An engine cut between its layers: each layer takes an input instead of what the layer before it made.

So a layer of the engine can be run on PyTorch's own inputs, all layers in one run, and what is wrong before a layer
does not reach it. The cut engine is a folder beside the weights (linked, not copied) that the runtime opens like any
other; ONNX Runtime reads the weights of the layers that are left and of no others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from seekforge.common.errors import EngineError
from seekforge.exporter.parity.engine_copy import engine_copy
from seekforge.exporter.program.taps import SELECTIONS, expose, tap_specs, taps_in
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.agreement import cache_block_bytes
from seekforge.formats.engine.manifest import load_manifest, save_manifest
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.step_io import DUMPED_RESULTS, INTERMEDIATE_TENSORS, TOPK_INDICES


def input_name(value: str) -> str:
    """Return the input that stands for what one layer hands to the next: `residual.3` -> `residual_in.3`."""
    kind, _, layer = value.rpartition(".")
    return f"{kind}_in.{layer}"


def cut_copy(engine: Path, out: Path, layers: tuple[int, int], taps: Collection[str] = ()) -> Path:
    """Write an engine for the CPU that holds layers [a, b) of another, each fed from outside.

    What goes into each layer but layer 0, and into the final norm where b is the last layer, is an input
    `hidden_states_in.{i}`, `residual_in.{i}` [B, Q, H], and `topk_indices_in.{i}` of a layer that shares a choice.
    What comes out is what each layer gives, its selections and caches, `taps`, and at the end of the model its
    results. The graph of the MTP module stays: it begins at the hidden state that it is fed.

    Args:
        engine: an engine of target cpu.
        out: the folder to make.
        layers: [a, b).
        taps: the names of tap points inside these layers that come out too.

    Raises:
        EngineError: the engine is compiled, or its layers cannot be told apart.
    """
    manifest = load_manifest(engine)
    start, stop = layers
    last = stop == int(manifest.config["num_hidden_layers"])
    config = ModelConfig.parse(manifest.config, str(engine))

    def edit(name: str, model: onnx.ModelProto, graph_io: GraphIO) -> GraphIO:
        before = {value.name for value in model.graph.output}
        if name != "model":
            added = [tap for tap in taps_in(model) if tap in taps]
            expose(model, added)
            return graph_io.model_copy(update={"outputs": (*graph_io.outputs, *tap_specs(model, added))})
        cuts = [layer for layer in range(start, stop + last) if layer > 0]
        _cut(model.graph, cuts, config, engine)
        inside = {tap for tap in taps if int(tap.rpartition(".")[2]) in range(start, stop)}
        wanted = {f"{point}.{layer + 1}" for layer in range(start, stop) for point in INTERMEDIATE_TENSORS}
        wanted |= {tap for tap in inside if not tap.startswith(INTERMEDIATE_TENSORS)}  # what goes in is an input
        added = [tap for tap in taps_in(model) if tap in wanted]
        expose(model, added)
        kinds = (*SELECTIONS, "latent_cache_out", "index_cache_out")
        kept = {name for name in before if _is_of(name, kinds, range(start, stop))} | (
            set(DUMPED_RESULTS) if last else set()
        )
        kept |= before & wanted  # what an engine with taps shows by itself
        if stop == manifest.layer_range[1]:  # a stage gives what goes out of it under names of its own
            kept |= before & {f"{point}_out" for point in (*INTERMEDIATE_TENSORS, TOPK_INDICES)}
        _keep(model.graph, kept | set(added))
        inputs = {value.name for value in model.graph.input}
        taken = tuple(
            TensorSpec(name=input_name(value), dtype="f32", shape=("B", "Q", config.hidden_size), role="token")
            for layer in cuts
            for value in _pair(layer)
        ) + tuple(
            TensorSpec(name=name, dtype="i32", shape=("B", "Q", config.index_topk), role="token")
            for layer in cuts
            for name in _shared(layer, config).values()
        )
        return graph_io.model_copy(
            update={
                "inputs": (*(spec for spec in graph_io.inputs if spec.name in inputs), *taken),
                "outputs": (*(spec for spec in graph_io.outputs if spec.name in kept), *tap_specs(model, added)),
                "aliases": {output: source for output, source in graph_io.aliases.items() if output in kept},
            }
        )

    cut = engine_copy(engine, out, edit, graphs=None if last else ("model",))
    cache = cut.cache.model_copy(
        update={
            "layers": tuple(range(start, stop)),
            "mtp_layer": cut.cache.mtp_layer if "mtp" in cut.graphs else None,
            "bytes_per_block": cache_block_bytes(cut.graphs.values(), cut.cache),
        }
    )
    save_manifest(out, cut.model_copy(update={"layer_range": layers, "cache": cache, "self_check": None}))
    return out


def _is_of(name: str, kinds: Collection[str], layers: Collection[int]) -> bool:
    kind, _, layer = name.rpartition(".")
    return kind in kinds and int(layer) in layers


def _pair(layer: int) -> list[str]:
    """Return the values that one layer takes of the layer before it."""
    return [f"{point}.{layer}" for point in INTERMEDIATE_TENSORS]


def _shared(layer: int, config: ModelConfig) -> dict[str, str]:
    """Return the keys that an earlier layer chose -> the input that stands for them in a layer that shares them."""
    if not config.shares_indices(layer):
        return {}
    return {f"{TOPK_INDICES}.{config.index_source(layer)}": input_name(f"{TOPK_INDICES}.{layer}")}


def _cut(graph: onnx.GraphProto, layers: Sequence[int], config: ModelConfig, engine: Path) -> None:
    """Make what goes into each of `layers` a graph input, in place."""
    producer = {name: node for node in graph.node for name in node.output}
    renamed = {value: input_name(value) for layer in layers for value in _pair(layer)}
    for value in (*renamed, *(value for layer in layers for value in _shared(layer, config))):
        if value not in producer:
            raise EngineError(f"{engine}: its graph shows no {value}, so it cannot be cut there; build it again")
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in set(_reads(node)):
            readers.setdefault(name, []).append(node)
    for layer in layers:
        for value, name in _shared(layer, config).items():
            for node in readers[value]:
                if _attends(node, readers) == layer:
                    node.input[:] = [name if one == value else one for one in node.input]
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, ["B", "Q", config.index_topk]))
    for node in graph.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
    for layer in layers:
        pair = _pair(layer)
        # a value that the layer before reads too would make that layer depend on what the next one takes
        if not {input_name(value) for value in pair}.isdisjoint(_values_behind(producer, pair)):
            raise EngineError(f"{engine}: layer {layer - 1} reads what goes into layer {layer}; build the engine again")
    graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "Q", config.hidden_size])
        for name in renamed.values()
    )


def _attends(node: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> int | None:
    """Return the layer whose attention a node that reads chosen keys belongs to: that of the first output behind it."""
    left, seen = [node], set[int]()
    while left:
        one = left.pop(0)
        for name in one.output:
            point, _, layer = name.rpartition(".")
            if point == "o_latent":
                return int(layer)
            left += [reader for reader in readers.get(name, ()) if id(reader) not in seen]
            seen |= {id(reader) for reader in readers.get(name, ())}
    return None


def _values_behind(producer: Mapping[str, onnx.NodeProto], values: Iterable[str]) -> set[str]:
    """Return all values that `values` are made of, themselves included."""
    behind: set[str] = set()
    left = list(values)
    while left:
        value = left.pop()
        if value not in behind:
            behind.add(value)
            if value in producer:
                left += _reads(producer[value])
    return behind


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the values that a node reads, those that its bodies take from outside included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _reads(inner)
            yield from (value.name for value in attribute.g.output)


def _keep(graph: onnx.GraphProto, outputs: Collection[str]) -> None:
    """Drop what `outputs` do not need: nodes, weights, inputs and other outputs."""
    producer = {name: node for node in graph.node for name in node.output}
    needed = _values_behind(producer, outputs)
    _filter(graph.node, lambda node: not needed.isdisjoint(node.output))
    _filter(graph.initializer, lambda tensor: tensor.name in needed)
    _filter(graph.input, lambda value: value.name in needed)
    _filter(graph.output, lambda value: value.name in outputs)


def _filter(values: Any, keeps: Callable[[Any], bool]) -> None:
    """Drop what is not kept from a repeated field, in place."""
    kept = [value for value in values if keeps(value)]
    del values[:]
    values.extend(kept)
