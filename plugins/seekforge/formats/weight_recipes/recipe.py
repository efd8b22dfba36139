"""What a recipe is: a small tree of plain data, which says how one weight input comes from checkpoint tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One node of a recipe tree.

    Attributes:
        op: take, slice, reshape, transpose, concat, stack, dequantize, scale_rows, nvfp4, cast, bytes, split or
            computed; block_codes or block_scales (`formats.quantization.block_fp8`); nvfp4_rows or nvfp4_scales
            (`formats.quantization.nvfp4`); codes, code_scales or packed (`formats.quantization.int_codes`).
        shape: shape of the result.
        dtype: element type of the result (our names, `common.dtypes.NUMPY`).
        parts: operands. `dequantize` and `scale_rows` have two: FP8 weight and f32 scale; `nvfp4` three: packed codes,
            block scales, the tensor's scale.
        tensor: `take`: the name of the checkpoint tensor. `computed`: rope_cos, rope_sin, hadamard, expert_map,
            vocab_start or ones.
        axis, start, stop: the bounds of slice; axis also that of concat, stack and split, of which each rank has an
            equal part.
        perm: the order of axes of transpose.
        params: for computed, the numbers that the table depends on; for codes, bits and block_size; for nvfp4,
            divides: whether its scale is a reciprocal.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Recipe, ...] = ()
    tensor: str | None = None
    axis: int | None = None
    start: int | None = None
    stop: int | None = None
    perm: tuple[int, ...] | None = None
    params: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; fields that are not set are left out."""
        raw: dict[str, Any] = {"op": self.op, "shape": list(self.shape), "dtype": self.dtype}
        for key in ("tensor", "axis", "start", "stop"):
            if getattr(self, key) is not None:
                raw[key] = getattr(self, key)
        if self.perm is not None:
            raw["perm"] = list(self.perm)
        if self.params:
            raw["params"] = dict(self.params)
        if self.parts:
            raw["parts"] = [part.to_dict() for part in self.parts]
        return raw
