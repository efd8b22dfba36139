"""A graph without functions: every custom operator replaced by its body, so that standard runtimes read the file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Final

import onnx
from onnx import inliner

from seekforge.exporter.program.metadata import annotate_again
from seekforge.exporter.program.specialize import specialize
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization

#: The form that ONNX Runtime's CPU provider computes: it has no kernels for bf16.
F32: Final = Specialization(activations="f32", fp8_storage="float8", kv_format="f32", bodies="ort")

_DESCRIPTION: Final = (
    "The program in FP32, its custom operators replaced by operators of ONNX: for ONNX Runtime without seekforge, and "
    "for viewers. Weights are inputs as in the canonical program, with f32 where that has bf16; caches are f32."
)


def plain(model: onnx.ModelProto, config: ModelConfig, *, keeps_weights: bool = False) -> onnx.ModelProto:
    """Return a canonical graph in the form that ONNX Runtime opens as it is; `keeps_weights`: it has no FP8 weights."""
    how = replace(F32, fp8_storage="kept") if keeps_weights else F32
    concrete = specialize(model, how, config)
    attach(concrete, how)
    result = inline(concrete)
    annotate_again(result, _DESCRIPTION, {"form": "plain program in f32", "custom_operators": "none"})
    return result


def inline(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy with the bodies of its functions in place of their calls, and only the domains that are left.

    Args:
        model: the graph with its functions.
        kept: op_types of custom operators that stay calls of their functions.
    """
    if kept:
        others = [(function.domain, function.name) for function in model.functions if function.name not in kept]
        result = inliner.inline_selected_functions(model, others)
    else:
        result = inliner.inline_local_functions(model)
    drop_unused(result)
    return result


def drop_unused(model: onnx.ModelProto) -> None:
    """Take out of a model the functions that nothing calls, and the domains of which it has no node."""
    by_name = {(function.domain, function.name): function for function in model.functions}
    called: set[tuple[str, str]] = set()
    waiting = list(_operators(model.graph.node))
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in called:
            called.add(name)
            waiting += _operators(by_name[name].node)
    functions = [function for name, function in by_name.items() if name in called]
    del model.functions[:]
    model.functions.extend(functions)
    left = {"", *(domain for domain, _ in _operators(model.graph.node)), *(domain for domain, _ in called)}
    keep = [entry for entry in model.opset_import if entry.domain in left]
    del model.opset_import[:]
    model.opset_import.extend(keep)


def _operators(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    """Yield domain and name of the operator of each node, bodies of Scan and If included."""
    for node in nodes:
        yield "" if node.domain == "ai.onnx" else node.domain, node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _operators(attribute.g.node)
