"""Ways to break an engine or a checkpoint a little, and to make a correct one that sums in another order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.onnxruntime.build import build
from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.parity.engine_copy import engine_copy
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.program import GraphIO
from seekforge.formats.targets import load_target

Edit = Callable[[np.ndarray], np.ndarray]


def small_model(folder: Path, **changes: object) -> Path:
    """Write a checkpoint of the tiny preset with other values in its config."""
    tiny = load_preset("tiny")
    raw = tiny.config_json | changes
    return new_checkpoint(folder, Preset("small", 2, raw, ModelConfig.parse(raw, "test"))).path


def edited_checkpoint(checkpoint: Path, out: Path, edits: Mapping[str, Edit]) -> Path:
    """Copy a checkpoint by links and rewrite the shards that hold the named tensors."""
    shutil.copytree(checkpoint, out, copy_function=os.link)
    with Checkpoint.open(checkpoint) as source:
        shards = {source.info(name).shard for name in edits}
        for shard in shards:
            tensors = {}
            for name in source.names:
                if source.info(name).shard == shard:
                    value = source.tensor(name)
                    tensors[name] = edits[name](np.array(value)) if name in edits else value
            (out / shard).unlink()
            write_shard(out / shard, tensors)
    return out


def scaled(factor: float, *index: int) -> Edit:
    """Multiply a tensor, or one element of it."""

    def edit(value: np.ndarray) -> np.ndarray:
        changed = value.astype(np.float32)
        if index:
            changed[index] *= factor
        else:
            changed *= factor
        return changed.astype(value.dtype)

    return edit


def build_engine(program: Path, checkpoint: Path, out: Path) -> Path:
    """Build for the CPU, quietly."""
    build(
        program,
        out,
        target=load_target("cpu"),
        checkpoint_folder=checkpoint,
        force=False,
        progress=Stages(quiet=True),
    )
    return out


def bent_engine(engine: Path, out: Path, factors: Mapping[str, np.ndarray]) -> Path:
    """Copy an engine in which what a layer has at a tap point is multiplied by [width], as a broken kernel might."""

    def bend(name: str, model: onnx.ModelProto, graph_io: GraphIO) -> GraphIO:
        for tap, factor in factors.items() if name == "model" else ():
            node = next(node for node in model.graph.node if tap in node.output)
            node.output[:] = [f"{tap}.right" if value == tap else value for value in node.output]
            model.graph.initializer.append(numpy_helper.from_array(factor, f"{tap}.factor"))
            place = list(model.graph.node).index(node) + 1
            model.graph.node.insert(place, helper.make_node("Mul", [f"{tap}.right", f"{tap}.factor"], [tap]))
        return graph_io

    engine_copy(engine, out, bend)
    return out


def split_products(engine: Path, out: Path) -> Path:
    """Copy an engine whose every product with a weight matrix is the sum of two halves of K: another order of sums."""

    def split(name: str, model: onnx.ModelProto, graph_io: GraphIO) -> GraphIO:
        assert _split(model.graph) >= 8
        return graph_io

    engine_copy(engine, out, split)
    return out


def _split(graph: onnx.GraphProto) -> int:
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for label, values in (("zero", [0]), ("end", [1 << 40]), ("last", [-1]), ("first", [0])):
        graph.initializer.append(helper.make_tensor(f"split.{label}", onnx.TensorProto.INT64, [1], values))
    halves: set[int] = set()
    nodes, count = [], 0
    for node in graph.node:
        if node.op_type != "MatMul" or len(sizes.get(node.input[1], ())) != 2:
            nodes.append(node)
            continue
        count += 1
        half = sizes[node.input[1]][0] // 2
        if half not in halves:
            graph.initializer.append(helper.make_tensor(f"split.{half}", onnx.TensorProto.INT64, [1], [half]))
            halves.add(half)
        parts = []
        for side, (start, stop) in enumerate((("split.zero", f"split.{half}"), (f"split.{half}", "split.end"))):
            base = f"{node.output[0]}.split{side}"
            nodes.append(helper.make_node("Slice", [node.input[0], start, stop, "split.last"], [f"{base}.x"]))
            nodes.append(helper.make_node("Slice", [node.input[1], start, stop, "split.first"], [f"{base}.w"]))
            nodes.append(helper.make_node("MatMul", [f"{base}.x", f"{base}.w"], [base]))
            parts.append(base)
        nodes.append(helper.make_node("Add", parts, [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    return count
