"""From a canonical graph to one of ONNX Runtime beside its weights, and its description."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import onnx

from seekforge.common.files import sha256_file
from seekforge.exporter.builder.onnxruntime.fold import fold_weights, limit_tables
from seekforge.exporter.builder.onnxruntime.fuse import fuse
from seekforge.exporter.program.graph_io import graph_io, roles_in
from seekforge.exporter.program.inline import F32, inline
from seekforge.exporter.program.metadata import annotate_again
from seekforge.exporter.program.specialize import specialize
from seekforge.exporter.program.taps import expose, name_taps
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import Limits
from seekforge.formats.engine.ranks import is_handed
from seekforge.formats.int_quant import Quantization
from seekforge.formats.program import GraphIO
from seekforge.formats.weight_recipes import Recipe, retarget
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.native import FUSED
from seekforge.plugins.onnx_schema import register_schemas
from seekforge.plugins.registry import NATIVE, NATIVE_FORMS

#: What a graph of an engine says of itself.
_ENGINE_GRAPH: Final = (
    "The program specialized for ONNX Runtime on a CPU; weights are constants in the file beside this one."
)
#: The tensors that scale with the context an engine accepts.
ROPE_TABLES: Final = ("rope_cos", "rope_sin")


def fold_graph(
    canonical: onnx.ModelProto,
    recipes: Mapping[str, Recipe],
    config: ModelConfig,
    *,
    coded: Quantization | None,
    limits: Limits,
    taps: bool,
    is_typed: bool = False,
) -> tuple[onnx.ModelProto, dict[str, Recipe]]:
    """Specialize and fold one graph.

    Args:
        canonical: the graph of the program, or a stage of it.
        recipes: the weights and tables that it reads, and perhaps others.
        config: the program's config.
        coded: which weights become codes.
        limits: the limits of the engine.
        taps: give the tensors inside each layer too.
        is_typed: note the types of all values, which nobody can tell behind products with codes.

    Returns:
        The graph, and its constants, which are inputs until they have a place in a file.
    """
    model = specialize(canonical, F32, config)
    names = name_taps(model)
    if taps:
        expose(model, names)
    if is_typed:
        register_schemas()
        model = onnx.shape_inference.infer_shapes(model)
    read = {value.name for value in model.graph.input}
    retargeted = {
        name: retarget(recipe, activations=F32.activations, fp8_dtype=F32.fp8_dtype)
        for name, recipe in recipes.items()
        if name in read
    }
    tables = limit_tables(retargeted, [name for name in ROPE_TABLES if name in retargeted], limits.max_model_len)
    return model, fold_weights(model, tables, coded, top_k=config.num_experts_per_tok)


def finish_graph(model: onnx.ModelProto, *, native: bool = True, keeps: Collection[str] = ()) -> onnx.ModelProto:
    """Fuse a folded graph, and give it the bodies of its operators.

    What the compiled library of CPU operators has stays one node each, whose body is a function of the file: ONNX
    Runtime inlines it where no library is. All others are inlined here.

    Args:
        model: the graph.
        native: whether there are such nodes; a graph that a GPU runs has none.
        keeps: op_types of further operators that stay nodes.
    """
    if native:
        fuse(model)
    attach(model, F32)
    inlined = inline(model, (*NATIVE, *NATIVE_FORMS, *FUSED, *keeps) if native else keeps)
    left = [function.name for function in inlined.functions]
    form = {"form": "engine for ONNX Runtime", "custom_operators": ", ".join(left) or "none"}
    annotate_again(inlined, _ENGINE_GRAPH, form)
    return inlined


def write_graph(model: onnx.ModelProto, folder: Path, canonical: GraphIO, file: str | None = None) -> GraphIO:
    """Write one engine graph beside its weights, check it as a file, and describe it. What it gives beside the
    canonical graph's outputs are taps, but for what pieces of it hand on.

    Args:
        model: the graph.
        folder: the engine folder.
        canonical: the graph of the program that it is, or of which it is a piece.
        file: its name; None: that of the program's graph.
    """
    file = file or canonical.file
    path = folder / file
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    roles = roles_in(canonical)
    return graph_io(
        model,
        file,
        role_of=lambda name: roles.get(name) or ("intermediate" if is_handed(name) else "tap"),
        aliases=canonical.aliases,
        sha256=sha256_file(path),
    )
