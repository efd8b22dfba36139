"""Turn products of a specialized f32 graph into ONNX Runtime's products with int8 or int4 weights.

A graph pass like `fold`: linears become `MatMulNBits`, routed experts `QMoE` under the program's own router. Both
round their inputs to int8 (`accuracy_level` 4): at one row exact inputs are 10 to 75 times slower with 8 bits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Final, get_args

import numpy as np
import onnx
from onnx import helper, numpy_helper

from seekforge.common.dtypes import ONNX
from seekforge.common.errors import TargetError
from seekforge.exporter.models import family_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.int_quant import Format, Quantization, dequantized, kind_of, packed, quantized
from seekforge.formats.targets import TargetConfig, WeightBlockSize
from seekforge.formats.weight_recipes import Recipe, reshape, split, stack, transpose

#: Where MatMulNBits and QMoE live.
MS_DOMAIN: Final = "com.microsoft"


def choose(
    target: TargetConfig, config: ModelConfig, bindings: Mapping[str, Mapping[str, Recipe]]
) -> Quantization | None:
    """Return how each weight is stored in an engine: as its family says at the target's precision, at most so small,
    but for weights that the target names. None: all are f32.

    Args:
        target: the target as options changed it.
        config: the program's config.
        bindings: graph -> weight or table -> recipe, as the program has them.

    Raises:
        TargetError: a pattern of the target names no weight or a part of one, or rows have no whole blocks.
    """
    codes = family_of(config).codes
    kinds = {kind: _at_precision(target.precision, smallest) for kind, smallest in codes.items()}
    named = {
        name: recipe
        for recipes in bindings.values()
        for name, recipe in recipes.items()
        if kind_of(name) in codes and not name.endswith("_scale")
    }
    weights: dict[str, Format] = {}
    for pattern, precision in target.weights.items():
        weights |= dict.fromkeys(_matching(pattern, named, codes), precision)
    how = Quantization.model_validate(
        {
            "precision": target.precision,
            "block_size": target.weight_block_size,
            "kinds": kinds,
            "weights": {name: stored for name, stored in weights.items() if stored != kinds[kind_of(name)]},
        }
    )
    for name, recipe in named.items():
        _check_experts(name, how)
        if how.bits(name):
            _check_rows(name, recipe, how)
    return how if any(map(how.bits, named)) else None


def _at_precision(precision: str, smallest: str) -> str:
    return "f32" if precision == "f32" else precision if smallest == "int4" else smallest


def _matching(pattern: str, named: Mapping[str, Recipe], codes: Mapping[str, str]) -> list[str]:
    """Return the weights whose kind, or all of whose checkpoint tensors, a pattern names."""
    matching, stays = [], ""
    for name, recipe in named.items():
        kind, tensors = kind_of(name), list(_tensors(recipe))
        hits = [tensor for tensor in tensors if fnmatchcase(tensor, pattern)]
        if not hits and not fnmatchcase(kind, pattern):
            continue
        if codes[kind] == "f32":
            stays = kind
        elif hits and len(hits) < len(tensors) and not fnmatchcase(kind, pattern):
            missing = next(tensor for tensor in tensors if tensor not in hits)
            raise TargetError(
                f"--set {pattern}: names {hits[0]} and not {missing}, which are one matrix of an engine; name all of "
                f"it, such as {kind}"
            )
        else:
            matching.append(name)
    if matching:
        return matching
    if stays:
        raise TargetError(f"--set {pattern}: {stays} stays f32, there is no product for its codes")
    kinds = [kind for kind, smallest in codes.items() if smallest != "f32"]
    close = difflib.get_close_matches(pattern[:100], kinds, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise TargetError(
        f"--set {pattern}: is no key of the target and names no weight, expected a kind ({', '.join(kinds)}) or a "
        f"tensor of the checkpoint, such as model.layers.0.*{hint}"
    )


def _tensors(recipe: Recipe) -> Iterator[str]:
    """Yield the checkpoint tensors of a weight, without those of its scales."""
    if recipe.tensor is not None and recipe.op == "take":
        yield recipe.tensor
    scaled = recipe.op in ("dequantize", "scale_rows", "nvfp4")
    for part in recipe.parts[:1] if scaled else recipe.parts:
        yield from _tensors(part)


def _check_rows(name: str, recipe: Recipe, how: Quantization) -> None:
    columns = recipe.shape[-1]
    if columns % how.block_size:
        fits = [str(size) for size in get_args(WeightBlockSize) if columns % size == 0]
        remedy = f"pass --weight-block-size {fits[-1]}" if fits else f"pass --set {kind_of(name)}=f32"
        raise TargetError(
            f"{name} has rows of {columns} values, which are no whole blocks of {how.block_size}; {remedy}"
        )


def _check_experts(name: str, how: Quantization) -> None:
    """Both matrices of an expert have codes of the same width: QMoE has one attribute for them."""
    prefix, _, last = name.rpartition(".")
    if last == "w13" and how.stored_as(name) != how.stored_as(f"{prefix}.w2"):
        raise TargetError(
            f"--set: {prefix} would have gate and up in {how.stored_as(name)} and down in "
            f"{how.stored_as(f'{prefix}.w2')}; experts of a layer have one precision: name experts, or *.experts.*"
        )


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
    Those of other ranks have the number −1, which is the place behind the last expert; it is cut off.
    """
    x, ids, weights, w13, w13_scale, w2, w2_scale = node.input
    bits = how.bits(w13)
    assert bits is not None
    experts = constants[w13].shape[0]
    for name, scale in ((w13, w13_scale), (w2, w2_scale)):
        ready = _expert_codes(constants[name], constants[scale], bits, how.block_size, interleaves=name == w13)
        constants[f"{name}.codes"], constants[f"{name}.scales"] = ready
    is_dealt = constants[w13].op == "split"
    places = experts + 1 if is_dealt else experts
    p = node.output[0]
    spread = [
        helper.make_node("Constant", [], [f"{p}.experts"], value=numpy_helper.from_array(np.array([places]))),
        helper.make_node("Constant", [], [f"{p}.zero"], value=numpy_helper.from_array(np.array(0, np.float32))),
        helper.make_node("Shape", [ids], [f"{p}.tokens"], start=0, end=1),
        helper.make_node("Concat", [f"{p}.tokens", f"{p}.experts"], [f"{p}.shape"], axis=0),
        helper.make_node("Expand", [f"{p}.zero", f"{p}.shape"], [f"{p}.zeros"]),
        helper.make_node("Cast", [ids], [f"{p}.ids"], to=ONNX["i64"]),
        helper.make_node("ScatterElements", [f"{p}.zeros", f"{p}.ids", weights], [f"{p}.routing"], axis=1),
    ]
    if is_dealt:
        spread[-1].output[0] = f"{p}.all"
        ends = {"first": 0, "here": experts, "axis": 1}
        spread += [
            helper.make_node("Constant", [], [f"{p}.{name}"], value=numpy_helper.from_array(np.array([number])))
            for name, number in ends.items()
        ]
        spread.append(helper.make_node("Slice", [f"{p}.all", *(f"{p}.{name}" for name in ends)], [f"{p}.routing"]))
    inputs = [x, f"{p}.routing", f"{w13}.codes", f"{w13}.scales", "", f"{w2}.codes", f"{w2}.scales"]
    product = helper.make_node("QMoE", [*inputs, *[""] * 7, f"{p}.routing"], [p], node.name, domain=MS_DOMAIN)
    attributes = {
        "k": min(top_k, experts),
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


def _expert_codes(
    weight: Recipe, scale: Recipe, bits: int, block_size: int, *, interleaves: bool
) -> tuple[Recipe, Recipe]:
    """Return the codes and scales of stacked experts as QMoE reads them; of experts that are dealt out to ranks, those
    of a rank.

    Args:
        weight, scale: the experts, stacked.
        bits: how many a code has.
        block_size: values along K that share a scale.
        interleaves: whether rows of gate and up come in turns.
    """
    if weight.op == "split":
        assert weight.axis == 0, "experts are dealt out whole"
        num_ranks = weight.parts[0].shape[0] // weight.shape[0]
        whole = _expert_codes(weight.parts[0], scale.parts[0], bits, block_size, interleaves=interleaves)
        return split(whole[0], 0, num_ranks), split(whole[1], 0, num_ranks)
    codes, scales = quantized(dequantized(weight, scale), bits, block_size)
    ready = packed(codes, bits, block_size)
    flat = stack(reshape(part, (part.shape[0], part.shape[1] * part.shape[2])) for part in ready.parts)
    return (_interleaved(flat), _interleaved(scales)) if interleaves else (flat, scales)


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
