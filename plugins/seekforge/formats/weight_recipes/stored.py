"""How checkpoints hold a matrix that engines multiply with: tensors of each form, and recipes of its values.

A form is a fact of the checkpoint (`ModelConfig.weight_form`), the same for export, build, parity and random
checkpoints. Programs have such a matrix in one of two ways: as FP8 values in 128×128 blocks with their scales, or kept,
as the values that the checkpoint means. Only the first two forms can become blocks; a program of any other form keeps
its values.

Sources: NVIDIA TensorRT Model Optimizer, unified Hugging Face export (`weight`, `weight_scale`, `weight_scale_2`,
`input_scale`); vllm-project/compressed-tensors, `nvfp4_pack_quantized` and `naive_quantized` (`weight_packed`,
`weight_global_scale`, which divides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import ProgramError
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization import block_fp8, nvfp4
from seekforge.formats.value_check import SCALE_SUFFIX
from seekforge.formats.weight_recipes.constructors import (
    block_codes,
    cast,
    dequantize,
    dequantize_nvfp4,
    ones_table,
    reshape,
    scale_rows,
    take,
)
from seekforge.formats.weight_recipes.constructors import block_scales as block_scales_of
from seekforge.formats.weight_recipes.recipe import Recipe

#: `fp8_blocks` is DeepSeek's. `ct_`: as LLM Compressor (compressed-tensors) writes it, else as ModelOpt does.
WeightForm = Literal[
    "fp8_blocks", "bf16", "ct_fp8_blocks", "ct_fp8_channel", "ct_fp8_tensor", "fp8_tensor", "nvfp4", "ct_nvfp4"
]  # fmt: skip
#: Forms of which programs can have FP8 blocks: as they are, or by quantizing.
BLOCK_FORMS: Final[tuple[WeightForm, ...]] = ("fp8_blocks", "ct_fp8_blocks", "bf16")
#: What each form is, for people.
WORDS: Final[dict[WeightForm, str]] = {
    "fp8_blocks": "FP8 in 128×128 blocks",
    "bf16": "BF16",
    "ct_fp8_blocks": "FP8 in 128×128 blocks (compressed-tensors)",
    "ct_fp8_channel": "FP8 with a scale for each row (compressed-tensors)",
    "ct_fp8_tensor": "FP8 with a scale for each matrix (compressed-tensors)",
    "fp8_tensor": "FP8 with a scale for each matrix (ModelOpt)",
    "nvfp4": "NVFP4 (ModelOpt)",
    "ct_nvfp4": "NVFP4 (compressed-tensors)",
}


@dataclass(frozen=True)
class StoredPart:
    """One tensor of a stored matrix.

    Attributes:
        name: its name in the checkpoint.
        dtype: our name of its element type.
        shape: sizes, outermost first.
        is_read: False for what the values do not hang on, scales of activations: such a tensor may be absent.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_read: bool = True


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the block scales of a weight [N, K]: [⌈N/128⌉, ⌈K/128⌉]."""
    n, k = shape
    return -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)


def stored_parts(form: WeightForm, name: str, shape: tuple[int, ...]) -> tuple[StoredPart, ...]:
    """Return the tensors in which a checkpoint holds a matrix, the values first.

    Args:
        form: how.
        name: the matrix, "….weight".
        shape: [N, K]; K a multiple of 16 for NVFP4.
    """
    n, k = shape
    module = name.removesuffix(".weight")
    if form == "bf16":
        return (StoredPart(name, "bf16", shape),)
    if form in ("nvfp4", "ct_nvfp4"):
        block_scales = StoredPart(f"{name}_scale", "f8e4m3", (n, k // nvfp4.BLOCK))
        if form == "nvfp4":
            whole = StoredPart(f"{name}_scale_2", "f32", ())
            unread = StoredPart(f"{module}.input_scale", "f32", (), is_read=False)
            return StoredPart(name, "u8", (n, k // 2)), block_scales, whole, unread
        whole = StoredPart(f"{name}_global_scale", "f32", (1,))
        unread = StoredPart(f"{module}.input_global_scale", "f32", (1,), is_read=False)
        return StoredPart(f"{name}_packed", "u8", (n, k // 2)), block_scales, whole, unread
    values = StoredPart(name, "f8e4m3", shape)
    if form == "fp8_blocks":
        return values, StoredPart(name + SCALE_SUFFIX, "f32", scale_shape(shape))
    if form == "fp8_tensor":
        unread = StoredPart(f"{module}.input_scale", "f32", (), is_read=False)
        return values, StoredPart(f"{name}_scale", "f32", ()), unread
    scales = {"ct_fp8_blocks": scale_shape(shape), "ct_fp8_channel": (n, 1), "ct_fp8_tensor": (1,)}[form]
    return values, StoredPart(f"{name}_scale", "f32", scales)


def names_read(form: WeightForm, name: str) -> tuple[str, ...]:
    """Return the names of the tensors that the values of a matrix hang on."""
    return tuple(part.name for part in stored_parts(form, name, (FP8_BLOCK, FP8_BLOCK)) if part.is_read)


def block_recipes(form: WeightForm, name: str, shape: tuple[int, ...]) -> tuple[Recipe, Recipe]:
    """Return the recipes of e4m3 values [N, K] and of their 128×128 block scales f32.

    Raises:
        ProgramError: the form holds values that are none of FP8 blocks.
    """
    if form not in BLOCK_FORMS:
        raise ProgramError(f"{name}: {WORDS[form]} cannot be read as FP8 blocks without rounding once more")
    taken = _taken(form, name, shape)
    if form == "bf16":
        return block_codes(taken[0]), block_scales_of(taken[0])
    return taken[0], taken[1]


def kept_recipes(form: WeightForm, name: str, shape: tuple[int, ...], dtype: str) -> tuple[Recipe, Recipe]:
    """Return the recipes of the values [N, K] in `dtype`, and of the block scales that they need: ones."""
    return values_recipe(form, name, shape, dtype), ones_table(*scale_shape(shape))


def values_recipe(form: WeightForm, name: str, shape: tuple[int, ...], dtype: str) -> Recipe:
    """Return the recipe of the values [N, K] that a checkpoint means, rounded once to `dtype` where they need be."""
    first, *others = _taken(form, name, shape)
    if form == "bf16":
        return cast(first, dtype)
    if form in ("fp8_blocks", "ct_fp8_blocks"):
        return dequantize(first, others[0], dtype)
    if form in ("nvfp4", "ct_nvfp4"):
        return dequantize_nvfp4(first, others[0], others[1], dtype, divides=form == "ct_nvfp4")
    scale = others[0]
    return scale_rows(first, scale if len(scale.shape) == 2 else reshape(scale, (1, 1)), dtype)


def _taken(form: WeightForm, name: str, shape: tuple[int, ...]) -> list[Recipe]:
    return [take(part.name, part.shape, part.dtype) for part in stored_parts(form, name, shape) if part.is_read]


def encode(form: WeightForm, name: str, values: np.ndarray) -> Mapping[str, np.ndarray]:
    """Return the tensors in which a checkpoint of a form holds `values` [N, K] f32, those that nothing reads too."""
    parts = stored_parts(form, name, values.shape)
    made: list[np.ndarray] = []
    if form == "bf16":
        made = [values.astype(NUMPY["bf16"])]
    elif form in ("fp8_blocks", "ct_fp8_blocks"):
        made = list(block_fp8.quantize(values))
    elif form in ("nvfp4", "ct_nvfp4"):
        coded = nvfp4.quantize(values)
        scale = 1 / coded.tensor_scale if form == "ct_nvfp4" else coded.tensor_scale
        if form == "ct_nvfp4":  # the reciprocal is what is stored: values are coded under what it gives back
            coded = nvfp4.quantize(values, float(1 / np.float32(scale)))
        made = [nvfp4.pack(coded.codes), coded.block_scales, np.full(parts[2].shape, scale, np.float32)]
    else:
        axis = 1 if form == "ct_fp8_channel" else None
        scale = np.maximum(np.abs(values).max(axis, keepdims=True), 1e-4).astype(np.float32) / np.float32(448)
        stored = np.clip(values / scale, -448, 448).astype(NUMPY["f8e4m3"])
        made = [stored, scale.reshape(parts[1].shape)]
    read = [part for part in parts if part.is_read]
    unread = {part.name: np.ones(part.shape, NUMPY[part.dtype]) for part in parts if not part.is_read}
    return {part.name: array for part, array in zip(read, made, strict=True)} | unread
