"""Recipes are computed: from any source of checkpoint tensors, into arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from seekforge.common.dtypes import NUMPY, widen
from seekforge.common.errors import ProgramError
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization import block_fp8, nvfp4
from seekforge.formats.quantization.int_codes import pack, quantize_rows
from seekforge.formats.weight_recipes.recipe import Recipe
from seekforge.formats.weight_recipes.tables import computed


class TensorSource(Protocol):
    """Where checkpoint tensors come from. `formats.checkpoint.safetensors.Checkpoint` is one."""

    def tensor(self, name: str) -> np.ndarray:
        """Return the tensor without copying where possible (float8 and bfloat16 as ml_dtypes)."""
        ...


@runtime_checkable
class RowSource(Protocol):
    """A source that reads files, and nothing of a tensor but what is asked for."""

    def dtype(self, name: str) -> str:
        """Return the name of a tensor's dtype, as it is stored."""
        ...

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out`, C-contiguous and of the tensor's dtype, with its rows from `start` on."""
        ...


class QuantizedOnce:
    """Checkpoint tensors from which codes and their scales are made at once.

    The scales of codes are kept until they are asked for, so whoever asks for one behind the other quantizes each
    weight once. Where there is room both are kept, for whoever asks next.

    Args:
        source: the checkpoint.
        room: bytes of codes and scales that are kept at most.
    """

    def __init__(self, source: TensorSource, room: int = 0) -> None:
        self.source = source
        self._room = room
        self._made: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}

    @staticmethod
    def of(source: TensorSource) -> QuantizedOnce:
        """Return a source itself if it is one of these, else one that keeps scales alone."""
        return source if isinstance(source, QuantizedOnce) else QuantizedOnce(source)

    def tensor(self, name: str) -> np.ndarray:
        """Return the tensor as its source does."""
        return self.source.tensor(name)

    def keep(self, recipe: Recipe, codes: np.ndarray, scales: np.ndarray) -> None:
        """Remember what was made of the operand of a `codes` or `code_scales` recipe."""
        size = codes.nbytes + scales.nbytes
        kept = codes if size <= self._room else None
        if kept is not None:
            self._room -= size
        if kept is not None or recipe.op == "codes":
            self._made[_operand(recipe)] = kept, scales

    def made(self, recipe: Recipe) -> np.ndarray | None:
        """Return what such a recipe makes, if it is kept; scales without their codes are then forgotten."""
        codes, scales = self._made.get(_operand(recipe), (None, None))
        if recipe.op == "codes":
            return codes
        if codes is None and scales is not None:
            del self._made[_operand(recipe)]
        return scales


def _operand(recipe: Recipe) -> str:
    return json.dumps([recipe.params, recipe.parts[0].to_dict()])


def evaluate(recipe: Recipe, source: TensorSource) -> np.ndarray:
    """Compute a recipe.

    A `take`, `slice` or `reshape` is a view of what the source gives (no copy); `concat`, `stack`, `dequantize` and
    `cast` allocate their result once. Of rows that are sliced off a tensor no others are read, if the source can.

    Returns:
        Array of `recipe.shape` and `recipe.dtype`.
    """
    if recipe.op == "take":
        assert recipe.tensor is not None
        return widen(source.tensor(recipe.tensor), recipe.dtype)
    if recipe.op == "computed":
        return computed(recipe)
    if recipe.op in ("concat", "stack") or (recipe.op == "slice" and _rows_of(recipe, source) is not None):
        out = np.empty(recipe.shape, NUMPY[recipe.dtype])
        evaluate_into(recipe, source, out)
        return out
    if recipe.op in ("codes", "code_scales"):
        return _codes(recipe, source)
    first = evaluate(recipe.parts[0], source)
    if recipe.op == "slice":
        assert recipe.axis is not None
        index = [slice(None)] * first.ndim
        index[recipe.axis] = slice(recipe.start, recipe.stop)
        return first[tuple(index)]
    if recipe.op == "reshape":
        return first.reshape(recipe.shape)
    if recipe.op == "transpose":
        return first.transpose(recipe.perm)
    if recipe.op == "bytes":
        return np.ascontiguousarray(first).view(np.int8)
    if recipe.op == "cast":
        return first.astype(NUMPY[recipe.dtype])
    if recipe.op == "dequantize":
        out = np.empty(recipe.shape, NUMPY[recipe.dtype])
        dequantize_into(first, evaluate(recipe.parts[1], source), out)
        return out
    if recipe.op == "packed":
        return pack(first, int(recipe.params["bits"]), int(recipe.params["block_size"]))
    if recipe.op == "block_codes":
        return block_fp8.quantize(first)[0]
    if recipe.op == "block_scales":
        return block_fp8.block_scales(first)
    if recipe.op == "scale_rows":
        return (FP8_VALUES[first.view(np.uint8)] * evaluate(recipe.parts[1], source)).astype(NUMPY[recipe.dtype])
    if recipe.op == "nvfp4_rows":
        return nvfp4.rows_of_fp8(np.ascontiguousarray(first))
    if recipe.op == "nvfp4_scales":
        return nvfp4.second_scales(first)
    if recipe.op == "nvfp4":
        return _nvfp4(recipe, first, source).astype(NUMPY[recipe.dtype])
    if recipe.op == "split":
        raise ProgramError("bindings: this recipe is shared by several ranks; apply for_rank first")
    raise ProgramError(f"bindings.json: unknown recipe op {recipe.op!r}; it was written by a newer version")


def evaluate_into(recipe: Recipe, source: TensorSource, out: np.ndarray) -> None:
    """Compute a recipe into `out`, which has its shape and dtype; parts are written in place."""
    if recipe.op == "stack":
        for part, row in zip(recipe.parts, out, strict=True):
            evaluate_into(part, source, row)
    elif recipe.op == "concat":
        assert recipe.axis is not None
        start = 0
        for part in recipe.parts:
            stop = start + part.shape[recipe.axis]
            index = [slice(None)] * out.ndim
            index[recipe.axis] = slice(start, stop)
            evaluate_into(part, source, out[tuple(index)])
            start = stop
    elif recipe.op == "transpose":
        assert recipe.perm is not None
        evaluate_into(recipe.parts[0], source, out.transpose(np.argsort(recipe.perm)))
    elif recipe.op == "dequantize":
        dequantize_into(evaluate(recipe.parts[0], source), evaluate(recipe.parts[1], source), out)
    elif recipe.op == "cast" and rounds_once(recipe):
        out[...] = evaluate(recipe.parts[0], source)
    elif out.flags.c_contiguous and out.dtype == NUMPY[recipe.dtype] and (rows := _rows_of(recipe, source)) is not None:
        rows(out)
    else:
        out[...] = evaluate(recipe, source)


def _rows_of(recipe: Recipe, source: TensorSource) -> Callable[[np.ndarray], None] | None:
    """Return what reads a recipe into an array, if it is a tensor as it is stored, or rows of one; else None."""
    if isinstance(source, QuantizedOnce):
        source = source.source
    start, take = 0, recipe
    if recipe.op == "slice" and recipe.axis == 0:
        assert recipe.start is not None
        start, take = recipe.start, recipe.parts[0]
    if take.op != "take" or take.tensor is None or not isinstance(source, RowSource):
        return None
    name = take.tensor
    return (lambda out: source.read_rows(name, start, out)) if source.dtype(name) == take.dtype else None


def _codes(recipe: Recipe, source: TensorSource) -> np.ndarray:
    """Compute a `codes` or a `code_scales` recipe."""
    once = source if isinstance(source, QuantizedOnce) else None
    if once is not None and (made := once.made(recipe)) is not None:
        return made
    bits, block_size = int(recipe.params["bits"]), int(recipe.params["block_size"])
    codes, scales = quantize_rows(evaluate(recipe.parts[0], source), bits, block_size)
    if once is not None:
        once.keep(recipe, codes, scales)
    return codes if recipe.op == "codes" else scales


def _nvfp4(recipe: Recipe, packed: np.ndarray, source: TensorSource) -> np.ndarray:
    block_scales, tensor_scale = (evaluate(part, source) for part in recipe.parts[1:])
    whole = np.float32(tensor_scale.reshape(-1)[0])
    codes = nvfp4.unpack(packed)
    if recipe.params["divides"]:
        steps = block_scales.astype(np.float32) / whole
        return nvfp4.dequantize_steps(codes, steps)
    return nvfp4.dequantize(nvfp4.Nvfp4(codes, block_scales, whole))


def rounds_once(recipe: Recipe) -> bool:
    """Whether assigning the operand of a cast gives the same as the cast: the operand itself rounds nothing."""
    part = recipe.parts[0]
    while part.op in ("slice", "reshape", "transpose"):
        part = part.parts[0]
    return part.op == "take"


def dequantize_into(weight: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Write `weight` [..., N, K] times its 128×128 block scales into `out`, one block row at a time.

    The product is formed in f32 and rounded once to the dtype of `out`. Extra memory: one block of rows.
    """
    if weight.ndim > 2:
        for w, s, o in zip(weight, scale, out, strict=True):
            dequantize_into(w, s, o)
        return
    k = weight.shape[1]
    for row, block_scale in enumerate(scale):
        rows = slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK)
        along_k = np.repeat(np.asarray(block_scale, np.float32), FP8_BLOCK)[:k]
        out[rows] = FP8_VALUES[weight[rows].view(np.uint8)] * along_k


def _e4m3_values() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(NUMPY["f8e4m3"]).astype(np.float32)


#: The value of each e4m3 byte, f32; 0x7F and 0xFF are NaN.
FP8_VALUES = _e4m3_values()
