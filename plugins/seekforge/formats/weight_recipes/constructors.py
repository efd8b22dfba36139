"""Functions that make recipes and work out their shapes, and recipes of what a target or a rank reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from seekforge.common.errors import ProgramError
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.formats.weight_recipes.recipe import Recipe


def take(tensor: str, shape: Iterable[int], dtype: str) -> Recipe:
    """The checkpoint tensor `tensor` as it is; one stored in a narrower type is widened (`dtypes.WIDENED_FROM`)."""
    return Recipe("take", tuple(shape), dtype, tensor=tensor)


def slice_(part: Recipe, axis: int, start: int, stop: int) -> Recipe:
    """Rows `start` to `stop` of `part` along `axis`."""
    if not 0 <= start < stop <= part.shape[axis]:
        raise ProgramError(f"slice {start}:{stop} of axis {axis} of {part.shape} is empty or out of range")
    shape = (*part.shape[:axis], stop - start, *part.shape[axis + 1 :])
    return Recipe("slice", shape, part.dtype, (part,), axis=axis, start=start, stop=stop)


def reshape(part: Recipe, shape: Iterable[int]) -> Recipe:
    """`part` seen with another shape of the same size."""
    shape = tuple(shape)
    if math.prod(shape) != math.prod(part.shape):
        raise ProgramError(f"reshape of {part.shape} to {shape} changes the number of elements")
    return Recipe("reshape", shape, part.dtype, (part,))


def transpose(part: Recipe, perm: Iterable[int]) -> Recipe:
    """`part` with its axes permuted."""
    perm = tuple(perm)
    return Recipe("transpose", tuple(part.shape[p] for p in perm), part.dtype, (part,), perm=perm)


def concat(parts: Iterable[Recipe], axis: int = 0) -> Recipe:
    """`parts` one after the other along `axis`."""
    parts = tuple(parts)
    first = parts[0]
    shape = (*first.shape[:axis], sum(p.shape[axis] for p in parts), *first.shape[axis + 1 :])
    return Recipe("concat", shape, first.dtype, parts, axis=axis)


def stack(parts: Iterable[Recipe]) -> Recipe:
    """`parts` along a new first axis."""
    parts = tuple(parts)
    return Recipe("stack", (len(parts), *parts[0].shape), parts[0].dtype, parts, axis=0)


def dequantize(weight: Recipe, scale: Recipe, dtype: str) -> Recipe:
    """`weight` [..., N, K] times its 128×128 block scales [..., ⌈N/128⌉, ⌈K/128⌉], rounded to `dtype`."""
    return Recipe("dequantize", weight.shape, dtype, (weight, scale))


def block_codes(weight: Recipe) -> Recipe:
    """The e4m3 values of a matrix [N, K] bf16 or f32 in 128×128 blocks, quantized as it is read (spec §5.1)."""
    return Recipe("block_codes", weight.shape, "f8e4m3", (weight,))


def block_scales(weight: Recipe) -> Recipe:
    """The scales [⌈N/128⌉, ⌈K/128⌉] f32 of `block_codes`."""
    n, k = weight.shape
    return Recipe("block_scales", (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), "f32", (weight,))


def scale_rows(weight: Recipe, scale: Recipe, dtype: str) -> Recipe:
    """An FP8 matrix [N, K] times a scale for each row [N, 1], or for all of it [1, 1], rounded to `dtype`."""
    return Recipe("scale_rows", weight.shape, dtype, (weight, scale))


def dequantize_nvfp4(
    packed: Recipe, block_scales: Recipe, tensor_scale: Recipe, dtype: str, *, divides: bool
) -> Recipe:
    """The values [N, K] of NVFP4, rounded to `dtype` (`quantization.nvfp4`).

    Args:
        packed: [N, K / 2] u8.
        block_scales: [N, K / 16] f8e4m3.
        tensor_scale: f32 of one element.
        dtype: element type of the result.
        divides: whether the tensor's scale is the reciprocal of what the block scales are multiplied with.
    """
    n, half = packed.shape
    parts, params = (packed, block_scales, tensor_scale), {"divides": float(divides)}
    return Recipe("nvfp4", (n, 2 * half), dtype, parts, params=params)


def nvfp4_rows(weight: Recipe) -> Recipe:
    """The NVFP4 rows [..., 9 K / 16] i8 of FP8 values [..., K] (`quantization.nvfp4.rows_of_fp8`)."""
    return Recipe("nvfp4_rows", (*weight.shape[:-1], row_bytes(weight.shape[-1])), "i8", (weight,))


def nvfp4_scales(scale: Recipe) -> Recipe:
    """What multiplies the 128×128 blocks of `nvfp4_rows` besides, f32, of the scales of the FP8 values."""
    return Recipe("nvfp4_scales", scale.shape, "f32", (scale,))


def ones_table(rows: int, columns: int) -> Recipe:
    """Block scales [rows, columns] f32 of weights that are kept: ones."""
    return Recipe("computed", (rows, columns), "f32", tensor="ones", params={"rows": rows, "columns": columns})


def wide_values(weight: Recipe, scale: Recipe, dtype: str) -> Recipe:
    """The values of a weight of a program in `dtype`: FP8 ones dequantized, kept ones as they are."""
    return cast(weight, dtype) if weight.dtype in ("bf16", "f32") else dequantize(weight, scale, dtype)


def cast(part: Recipe, dtype: str) -> Recipe:
    """`part` rounded to `dtype`; `part` itself when it already has it."""
    if part.dtype == dtype:
        return part
    return Recipe("cast", part.shape, dtype, (part,))


def as_bytes(part: Recipe) -> Recipe:
    """FP8 values as int8 elements of the same bytes, for targets without a float8 type."""
    return Recipe("bytes", part.shape, "i8", (part,))


def expert_map(num_experts: int, parallelism: Parallelism) -> Recipe:
    """The table [num_experts] i32 from an expert's number to its place on this rank, −1 where it is elsewhere."""
    params: dict[str, float] = {"num_experts": num_experts, "ep": parallelism.ep_size}
    return Recipe("computed", (num_experts,), "i32", tensor="expert_map", params=params)


def vocab_start(vocab_size: int, parallelism: Parallelism) -> Recipe:
    """The table [1] i32 with the first token of this rank's part of the vocabulary."""
    params: dict[str, float] = {"vocab_size": vocab_size, "tp": parallelism.tp}
    return Recipe("computed", (1,), "i32", tensor="vocab_start", params=params)


def rope_table(kind: str, *, num_positions: int, dim: int, rope: Mapping[str, float]) -> Recipe:
    """The cosine or sine table [num_positions, dim / 2] in f32 (`kind`: rope_cos or rope_sin)."""
    params = {"num_positions": num_positions, "dim": dim, **rope}
    return Recipe("computed", (num_positions, dim // 2), "f32", tensor=kind, params=params)


def hadamard_table(size: int) -> Recipe:
    """The orthonormal Sylvester Hadamard matrix [size, size] in f32 (spec §3.6)."""
    return Recipe("computed", (size, size), "f32", tensor="hadamard", params={"size": size})


def retarget(recipe: Recipe, *, activations: str, fp8_dtype: str) -> Recipe:
    """Return `recipe` for a specialized program: bf16 results become `activations`, FP8 ones `fp8_dtype`.

    A dequantized weight is rounded to `activations` directly, so f32 keeps every bit.
    """
    if recipe.op == "take":
        if recipe.dtype == "f8e4m3":
            return recipe if fp8_dtype == "f8e4m3" else as_bytes(recipe)
        return cast(recipe, activations) if recipe.dtype == "bf16" else recipe
    if recipe.op in ("dequantize", "scale_rows", "nvfp4"):
        return replace(recipe, dtype=activations if recipe.dtype == "bf16" else recipe.dtype)
    if recipe.op == "block_codes":
        return recipe if fp8_dtype == "f8e4m3" else as_bytes(recipe)
    if recipe.op in ("block_scales", "nvfp4_rows", "nvfp4_scales"):
        return recipe
    parts = tuple(retarget(part, activations=activations, fp8_dtype=fp8_dtype) for part in recipe.parts)
    if recipe.op == "cast":
        return cast(parts[0], activations) if recipe.dtype == "bf16" else replace(recipe, parts=parts)
    return replace(recipe, parts=parts, dtype=parts[0].dtype if parts else recipe.dtype)


def split(part: Recipe, axis: int, num_ranks: int) -> Recipe:
    """An equal part of `part` along `axis` for each of `num_ranks` ranks; `part` itself for one.

    Raises:
        ProgramError: the axis does not divide.
    """
    if num_ranks == 1:
        return part
    if part.shape[axis] % num_ranks:
        raise ProgramError(f"axis {axis} of {part.shape} does not divide into {num_ranks} equal parts")
    shape = (*part.shape[:axis], part.shape[axis] // num_ranks, *part.shape[axis + 1 :])
    return Recipe("split", shape, part.dtype, (part,), axis=axis)


def for_rank(recipe: Recipe, parallelism: Parallelism, tp_rank: int) -> Recipe:
    """Return what one rank of a stage reads: every split becomes that rank's slice.

    Raises:
        ProgramError: there is no such rank, or a split is one among another number of ranks.
    """
    tp = parallelism.tp
    if not 0 <= tp_rank < tp:
        raise ProgramError(f"tensor-parallel rank {tp_rank}: expected 0 to {tp - 1} of {parallelism}")
    if tp == 1:
        return recipe
    if recipe.tensor == "expert_map":
        return replace(recipe, params=recipe.params | {"ep_rank": tp_rank if parallelism.ep else 0})
    if recipe.tensor == "vocab_start":
        return replace(recipe, params=recipe.params | {"tp_rank": tp_rank})
    if not recipe.parts:
        return recipe
    if recipe.op == "split":
        assert recipe.axis is not None
        whole, size = recipe.parts[0], recipe.shape[recipe.axis]
        if whole.shape[recipe.axis] != size * tp:
            raise ProgramError(
                f"bindings: a split of {list(whole.shape)} into {list(recipe.shape)} is not one among {tp} ranks"
            )
        start, stop = tp_rank * size, (tp_rank + 1) * size
        if whole.op == "stack" and recipe.axis == 0:  # name only the parts that are read
            return stack(for_rank(part, parallelism, tp_rank) for part in whole.parts[start:stop])
        return slice_(for_rank(whole, parallelism, tp_rank), recipe.axis, start, stop)
    return replace(recipe, parts=tuple(for_rank(part, parallelism, tp_rank) for part in recipe.parts))
