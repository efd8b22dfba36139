"""Which weights of an engine are small integers (`codes`), and the recipes of such weights.

Inputs of a product with such weights are rounded to int8, one scale per block, as ONNX Runtime's fast products do
(`accuracy_level` 4); that takes the place of the rounding to FP8 that the numerics of the program may ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Final, Literal

from seekforge.common.errors import ProgramError
from seekforge.common.records import Record
from seekforge.formats.weight_recipes import Recipe, cast, stack, wide_values

Format = Literal["f32", "int8", "int4"]
BITS: Final[dict[str, int]] = {"int8": 8, "int4": 4}


class Quantization(Record):
    """How an engine stores its weights.

    Attributes:
        precision: what was asked for.
        block_size: values along K that share a scale, of weights and of the inputs of their products.
        kinds: kind of weight (`kind_of`) -> how it is stored. Weights of no kind here (norms, tables) are f32.
        weights: parameter -> how it is stored, of those that are stored otherwise than their kind.
    """

    precision: Format
    block_size: int
    kinds: dict[str, Format]
    weights: dict[str, Format] = field(default_factory=dict)

    def stored_as(self, name: str) -> Format:
        """Return how a parameter is stored."""
        return self.weights.get(name) or self.kinds.get(kind_of(name), "f32")

    def bits(self, name: str) -> int | None:
        """Return the bits of the codes of a parameter, None for one that stays f32."""
        return BITS.get(self.stored_as(name))

    def stored_in(self, layer: int, kind: str) -> Format:
        """Return how a layer stores its weights of one kind; of those outside of layers the number does not matter."""
        for name, stored in self.weights.items():
            if kind_of(name) == kind and name.startswith((f"layers.{layer}.", f"{kind}.")):
                return stored
        return self.kinds.get(kind, "f32")

    @property
    def smallest(self) -> Format:
        """The format of the fewest bits that any weight has."""
        return min((*self.kinds.values(), *self.weights.values()), key=lambda stored: BITS.get(stored, 32))


def kind_of(name: str) -> str:
    """Return the kind of a parameter: the last part of its module's name, `experts` for those of routed experts."""
    parts = name.split(".")
    return "experts" if "experts" in parts else parts[-2] if parts[-1].startswith("weight") else parts[-1]


def quantized(weight: Recipe, bits: int, block_size: int) -> tuple[Recipe, Recipe]:
    """Return the recipes of codes [..., N, K] i8 and scales [..., N, K / block_size] f32 of an f32 recipe.

    Raises:
        ProgramError: K is no multiple of `block_size`.
    """
    if weight.shape[-1] % block_size:
        raise ProgramError(f"a weight of shape {weight.shape} has no whole blocks of {block_size} along its last axis")
    if weight.op == "stack":  # one expert at a time
        codes, scales = zip(*(quantized(part, bits, block_size) for part in weight.parts), strict=True)
        return stack(codes), stack(scales)
    params: dict[str, float] = {"bits": bits, "block_size": block_size}
    short = (*weight.shape[:-1], weight.shape[-1] // block_size)
    return (
        Recipe("codes", weight.shape, "i8", (weight,), params=params),
        Recipe("code_scales", short, "f32", (weight,), params=params),
    )


def packed(codes: Recipe, bits: int, block_size: int) -> Recipe:
    """Return the recipe of the packed form of codes, u8 [..., K / block_size, block_size · bits / 8]."""
    if codes.op == "stack":
        return stack(packed(part, bits, block_size) for part in codes.parts)
    shape = (*codes.shape[:-1], codes.shape[-1] // block_size, block_size * bits // 8)
    return Recipe("packed", shape, "u8", (codes,), params={"bits": bits, "block_size": block_size})


def dequantized(weight: Recipe, scale: Recipe) -> Recipe:
    """Return the f32 recipe of an FP8 or kept weight; of stacked ones a stack, so that each is evaluated by itself."""
    if weight.op == scale.op == "stack":
        return stack(dequantized(w, s) for w, s in zip(weight.parts, scale.parts, strict=True))
    return wide_values(weight, scale, "f32")


def quantized_recipes(recipes: Mapping[str, Recipe], how: Quantization) -> dict[str, Recipe]:
    """Return the recipes of a model's parameters with codes and scales where `how` says so.

    FP8 weights come as a pair of parameters and stay one: `x.weight` or `x` with `x_scale`, now [N, K] i8 and
    [N, K / block_size] f32. A weight without scales (that of the head) gets a new parameter with that name.
    """
    result = dict(recipes)
    for name, recipe in recipes.items():
        bits = how.bits(name)
        if bits is None or name.endswith("_scale"):
            continue
        scale = recipes.get(f"{name}_scale")
        weight = cast(recipe, "f32") if scale is None else dequantized(recipe, scale)
        result[name], result[f"{name}_scale"] = quantized(weight, bits, how.block_size)
    return result
