"""Turn products of a specialized f32 graph into ONNX Runtime's products with int8 or int4 weights.

A graph pass like `fold`: linears become `MatMulNBits`, routed experts `QMoE` under the program's own router. Both
round their inputs to int8 (`accuracy_level` 4): at one row exact inputs are 10 to 75 times slower with 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from seekforge.common.dtypes import ONNX
from seekforge.exporter.models import family_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.int_quant import Quantization, dequantized, packed, quantized
from seekforge.formats.weight_recipes import Recipe, reshape, stack, transpose

#: Where MatMulNBits and QMoE live.
MS_DOMAIN: Final = "com.microsoft"
#: Values that share a scale. ONNX Runtime takes 16, 32, 64, 128 and 256; the smallest error for its bytes.
BLOCK_SIZE: Final = 32


def choose(precision: str, config: ModelConfig) -> Quantization:
    """Return how each kind of weight is stored in an engine of `precision`: as its family says, at most so small."""
    codes = family_of(config).codes
    kinds = {kind: precision if smallest == "int4" else smallest for kind, smallest in codes.items()}
    return Quantization.model_validate({"precision": precision, "block_size": BLOCK_SIZE, "kinds": kinds})


def quantize_linear(
    node: onnx.NodeProto, weight: Recipe, name: str, how: Quantization, constants: dict[str, Recipe]
) -> None:
    """Make `node`, a product whose first input is x, a `MatMulNBits` with the codes of a weight.

    Args:
        weight: f32 [N, K].
        name: the name of the weight.
        constants: gets the codes and scales.
    """
    bits = how.bits(name)
    assert bits is not None
    codes, scales = quantized(weight, bits, how.block_size)
    n, k = weight.shape
    constants[f"{name}.codes"], constants[f"{name}.scales"] = packed(codes, bits, how.block_size), scales
    node.op_type, node.domain = "MatMulNBits", MS_DOMAIN
    node.input[:] = [node.input[0], f"{name}.codes", f"{name}.scales"]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": how.block_size, "accuracy_level": 4}
    _set_attributes(node, attributes)


def quantize_experts(
    node: onnx.NodeProto, top_k: int, how: Quantization, constants: dict[str, Recipe]
) -> list[onnx.NodeProto]:
    """Return what replaces a `MoeExperts` node: its routing spread over all experts, and `QMoE`.

    QMoE takes the `top_k` largest of its router input, and weights as they are: given the program's weights, and zeros
    for the other experts, as both, it runs the experts that the program's router chose with exactly its weights.
    """
    x, ids, weights, w13, w13_scale, w2, w2_scale = node.input
    bits = how.bits(w13)
    assert bits is not None
    experts, inter2, _ = constants[w13].shape
    for name, scale, rows in ((w13, w13_scale, inter2), (w2, w2_scale, None)):
        codes, scales = quantized(dequantized(constants[name], constants[scale]), bits, how.block_size)
        ready = packed(codes, bits, how.block_size)
        flat = stack(reshape(part, (part.shape[0], part.shape[1] * part.shape[2])) for part in ready.parts)
        constants[f"{name}.codes"] = _interleaved(flat) if rows else flat
        constants[f"{name}.scales"] = _interleaved(scales) if rows else scales
    p = node.output[0]
    spread = [
        helper.make_node("Constant", [], [f"{p}.experts"], value=numpy_helper.from_array(np.array([experts]))),
        helper.make_node("Constant", [], [f"{p}.zero"], value=numpy_helper.from_array(np.array(0, np.float32))),
        helper.make_node("Shape", [ids], [f"{p}.tokens"], start=0, end=1),
        helper.make_node("Concat", [f"{p}.tokens", f"{p}.experts"], [f"{p}.shape"], axis=0),
        helper.make_node("Expand", [f"{p}.zero", f"{p}.shape"], [f"{p}.zeros"]),
        helper.make_node("Cast", [ids], [f"{p}.ids"], to=ONNX["i64"]),
        helper.make_node("ScatterElements", [f"{p}.zeros", f"{p}.ids", weights], [f"{p}.routing"], axis=1),
    ]
    inputs = [x, f"{p}.routing", f"{w13}.codes", f"{w13}.scales", "", f"{w2}.codes", f"{w2}.scales"]
    product = helper.make_node("QMoE", [*inputs, *[""] * 7, f"{p}.routing"], [p], node.name, domain=MS_DOMAIN)
    attributes = {
        "k": top_k,
        "expert_weight_bits": bits,
        "block_size": how.block_size,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 0,
        "accuracy_level": 4,
        "weights_prepacked": 0,
    }
    _set_attributes(product, attributes)
    return [*spread, product]


def _interleaved(rows: Recipe) -> Recipe:
    """Return stacked [E, 2I, W] with gate and up rows in turns, as QMoE's fused activation reads them."""

    def one(part: Recipe) -> Recipe:
        count, width = part.shape
        pairs = transpose(reshape(part, (2, count // 2, width)), (1, 0, 2))
        return reshape(pairs, (count, width))

    return stack(one(part) for part in rows.parts)


def _set_attributes(node: onnx.NodeProto, attributes: Mapping[str, int | float | str]) -> None:
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
