"""`BlockFp8Linear` in plain torch: dequantize both operands to f32, multiply, round once."""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.plugins.quant import BLOCK, dequantize_weight, fake_quantize


def block_fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    act_quant: str,
    *,
    x_codes: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """Return x · Wᵀ.

    Args:
        x: [..., K], f32 or bf16.
        weight: [N, K] float8_e4m3fn or its bytes as int8.
        weight_scale: [⌈N/128⌉, ⌈K/128⌉] f32.
        act_quant: ue8m0 or none.
        x_codes, x_scale: [..., K / 4] int32, four bytes of e4m3 each, and [..., K / 128] f32: what `x` is quantized to,
            if that is known; `x` says the dtype alone then.

    Returns:
        [..., N], dtype of `x`.

    Source: spec §5.2 "Reference equivalent"; DeepGEMM @54e22612 computes the same with f32 promotion per 128.
    """
    rows = fake_quantize(x) if act_quant == "ue8m0" else x
    if x_codes is not None and x_scale is not None:
        codes = x_codes.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, BLOCK))
        rows = (codes * x_scale.unsqueeze(-1)).flatten(-2)
    return (rows.float() @ dequantize_weight(weight, weight_scale).T).to(x.dtype)
