"""`BlockFp8Linear` in plain torch: dequantize both operands to f32, multiply, round once."""

from torch import Tensor

from seekforge.plugins.quant import dequantize_weight, fake_quantize


def block_fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, act_quant: str) -> Tensor:
    """Return x · Wᵀ.

    Args:
        x: [..., K], f32 or bf16.
        weight: [N, K] float8_e4m3fn or its bytes as int8.
        weight_scale: [⌈N/128⌉, ⌈K/128⌉] f32.
        act_quant: ue8m0 or none.

    Returns:
        [..., N], dtype of `x`.

    Source: spec §5.2 "Reference equivalent"; DeepGEMM @54e22612 computes the same with f32 promotion per 128.
    """
    if act_quant == "ue8m0":
        x = fake_quantize(x)
    return (x.float() @ dequantize_weight(weight, weight_scale).T).to(x.dtype)
