"""A canonical graph made ready for TensorRT: specialized, custom nodes left for plugins or inlined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, inliner

from seekforge.common.dtypes import FROM_TENSORRT
from seekforge.exporter.builder.tensorrt.passes.add_norms import use_norms
from seekforge.exporter.builder.tensorrt.passes.bf16_linears import use_bf16_linear
from seekforge.exporter.builder.tensorrt.passes.nodes import widens
from seekforge.exporter.builder.tensorrt.passes.nvfp4_experts import use_nvfp4
from seekforge.exporter.builder.tensorrt.passes.rope import write_out_rope
from seekforge.exporter.builder.tensorrt.passes.shared_experts import NEEDS, use_shared_experts
from seekforge.exporter.program.specialize import specialize
from seekforge.exporter.program.taps import name_taps, tap_shape
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.program import TensorSpec
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, BLOCK_FP8_LINEAR, SPECS
from seekforge.plugins.sum_ranks.collective import to_collectives
from seekforge.plugins.tensorrt.plugin import KERNEL_DIGEST, OP_VERSION, PRODUCTS


@dataclass(frozen=True)
class Prepared:
    """A graph that TensorRT can parse.

    Attributes:
        model: without functions; custom nodes are plugins.
        operators: the specialized graph before anything was inlined, for the audit.
        plugins: op_type -> nodes left for plugins.
        inlined: op_type -> nodes inlined.
        taps: names of the tensors inside layers that the plan shall show.
        collectives: sums over ranks, which neither a plugin nor a body does.
    """

    model: onnx.ModelProto
    operators: onnx.ModelProto
    plugins: dict[str, int]
    inlined: dict[str, int]
    taps: tuple[str, ...] = ()
    collectives: int = 0


def prepare(
    model: onnx.ModelProto,
    how: Specialization,
    config: ModelConfig,
    *,
    plugins: Collection[str],
    products: str,
    digests: dict[str, str],
    taps: bool = False,
    weights: Collection[str] = (),
    bf16_linears: Collection[str] = (),
    nvfp4_experts: bool = False,
) -> Prepared:
    """Specialize a canonical graph and decide what becomes of every custom node.

    Args:
        model: canonical graph.
        how: dtypes of the target; `bodies` must be `trt`.
        config: the model's config.
        plugins: op_types that become plugins; the others are inlined.
        products: fp8 or bf16, the precision in which plugins multiply.
        digests: op_type -> digest of its kernels for the plugins, where there are kernels.
        taps: give the tensors inside each layer the names that `parity` knows.
        weights: inputs that may change their type, see `widen_weights`.
        bf16_linears: weights whose products become `Bf16Linear`, see `use_bf16_linear`.
        nvfp4_experts: whether experts get their weights in NVFP4.

    Raises:
        ProgramError: an operator that is to be inlined has no body for `how`.
    """
    specialized = specialize(model, how, config)
    use_bf16_linear(specialized, bf16_linears)
    widen_weights(specialized, weights)
    if nvfp4_experts:
        use_nvfp4(specialized)
    names = tuple(name_taps(specialized)) if taps else ()
    if {ADD_RMS_NORM_QUANTIZE, BLOCK_FP8_LINEAR}.issubset(plugins):
        use_norms(specialized, readers=plugins)
    if NEEDS.issubset(plugins) and not taps:
        use_shared_experts(specialized)
    collectives = to_collectives(specialized)
    counts = Counter(node.op_type for node in specialized.graph.node if node.domain == DOMAIN)
    operators = onnx.ModelProto()
    operators.CopyFrom(specialized)
    inlined = {op: count for op, count in counts.items() if op not in plugins}
    if inlined:
        specialized = _inline(specialized, how, inlined)
        write_out_rope(specialized)
    for node in specialized.graph.node:
        if node.domain == DOMAIN:
            _describe(node, products, digests.get(node.op_type, ""))
    return Prepared(
        specialized, operators, {op: n for op, n in counts.items() if op in plugins}, inlined, names, collectives
    )


def wide_weights(model: onnx.ModelProto, weights: Collection[str]) -> set[str]:
    """Return the BF16 weights that a graph only reads as f32: norms, router, head.

    Args:
        model: canonical, or specialized with bf16 activations.
        weights: inputs that are weights.
    """
    graph = model.graph
    bf16 = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    results = {value.name for value in graph.output}
    cast: set[str] = set()
    otherwise: set[str] = set()
    for node in graph.node:
        (cast if widens(node) and node.output[0] not in results else otherwise).update(node.input)
    return bf16.intersection(weights, cast) - otherwise


def widen_weights(model: onnx.ModelProto, weights: Collection[str]) -> set[str]:
    """Make f32 inputs of a graph's `wide_weights`, and drop its casts.

    A cast in the graph would run in every step, and its result be memory beside the weight: for the head of
    DeepSeek-V3.2 3.7 GB written and read again per token.

    Args:
        model: specialized graph, changed in place.
        weights: inputs that are weights.

    Returns:
        Those that are f32 now.
    """
    graph, wide = model.graph, wide_weights(model, weights)
    dropped = {node.output[0]: node for node in graph.node if not wide.isdisjoint(node.input)}
    kept = [node for node in graph.node if node.output[0] not in dropped]
    for node in kept:
        for place, name in enumerate(node.input):
            if name in dropped:  # the reader now has the weight's place in the model, for messages
                node.input[place] = dropped[name].input[0]
                node.name = f"{dropped[name].name.rpartition('/')[0]}/{node.op_type}"
    del graph.node[:]
    graph.node.extend(kept)
    for value in graph.input:
        if value.name in wide:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return wide


def debug_specs(taps: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """Describe debug tensors for a manifest.

    Args:
        taps: name -> TensorRT's word for its type.
    """
    return tuple(
        TensorSpec(name=n, dtype=FROM_TENSORRT[word], shape=tap_shape(n, taps), role="debug")
        for n, word in taps.items()
    )


def _inline(model: onnx.ModelProto, how: Specialization, ops: Collection[str]) -> onnx.ModelProto:
    """Replace the nodes of `ops` by their bodies."""
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:  # hide the others: they may have no body at all
        if node.domain == DOMAIN and node.op_type not in ops:
            node.domain = _HIDDEN
            kept.append(node)
    attach(model, how)
    result = inliner.inline_local_functions(model)
    for node in result.graph.node:
        if node.domain == _HIDDEN:
            node.domain = DOMAIN
    for entry in list(result.opset_import):
        if entry.domain == DOMAIN and not kept:
            result.opset_import.remove(entry)
    return result


_HIDDEN = "seekforge.plugin"


def _describe(node: onnx.NodeProto, products: str, digest: str) -> None:
    """Write on the node what the plugin needs beside the operator's attributes."""
    extra = {
        PLUGIN_NAMESPACE: DOMAIN,
        PRODUCTS: products,
        KERNEL_DIGEST: digest,
        OP_VERSION: SPECS[node.op_type].version,
    }
    kept = [attribute for attribute in node.attribute if attribute.name not in extra]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in extra.items())])
