"""`MoeExperts` in plain torch: one expert after the other, its tokens only."""

import torch
from torch import Tensor

from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.nvfp4 import from_rows
from seekforge.plugins.block_fp8_linear.reference import block_fp8_linear


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up for [..., gate | up]; formed in f32 and rounded once (spec §4)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def nvfp4_values(rows: Tensor, scale: Tensor) -> Tensor:
    """Return the values [..., N, K] f32 of NVFP4 rows [..., N, 9 K / 16] int8 and what multiplies 128×128 blocks."""
    values = torch.from_numpy(from_rows(rows.cpu().numpy())).to(rows.device)
    return values * scale.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    act_quant: str,
    *,
    x_codes: Tensor | None = None,
    x_scale: Tensor | None = None,
    shared_w13: Tensor | None = None,
    shared_w13_scale: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of the experts' outputs.

    Args:
        x: [T, H], f32 or bf16. expert_ids: [T, k] int32; −1 is an expert of another rank and adds nothing.
        expert_weights: [T, k] f32.
        w13: [E, 2I, H], w2: [E, H, I], e4m3 or its bytes as int8, with their 128×128 block scales; or rows of NVFP4,
            [E, 2I, 9 H / 16] and [E, H, 9 I / 16] int8, with what multiplies them besides in the place of these.
        act_quant: ue8m0 or none.
        x_codes, x_scale: [T, H / 4] int32, four bytes of e4m3 each, and [T, H / 128] f32: what `x` is quantized to, if
            that is known; `x` says the dtype alone then.
        shared_w13, shared_w2: [2S, H] and [H, S], e4m3 or its bytes, with their scales: an expert of every token.

    Returns:
        [T, H] f32. Each expert's output is rounded to the dtype of `x` before it is weighted.

    Source: HF inference/model.py, `MoE.forward`.
    """

    def mlp(rows: Tensor | slice, gate_up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor) -> Tensor:
        codes = {} if x_codes is None or x_scale is None else {"x_codes": x_codes[rows], "x_scale": x_scale[rows]}
        hidden = swiglu(block_fp8_linear(x[rows], gate_up, up_scale, act_quant, **codes))
        return block_fp8_linear(hidden, down, down_scale, act_quant).float()

    is_nvfp4 = w13.shape[-1] != x.shape[-1]
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in expert_ids[expert_ids >= 0].unique().tolist():
        rows, column = torch.nonzero(expert_ids == expert, as_tuple=True)
        gate_up, down = w13[expert], w2[expert]
        if is_nvfp4:
            gate_up, down = nvfp4_values(gate_up, w13_scale[expert]), nvfp4_values(down, w2_scale[expert])
        out = mlp(rows, gate_up, w13_scale[expert], down, w2_scale[expert])
        y[rows] += out * expert_weights[rows, column, None]
    if shared_w13 is None or shared_w13_scale is None or shared_w2 is None or shared_w2_scale is None:
        return y
    return y + mlp(slice(None), shared_w13, shared_w13_scale, shared_w2, shared_w2_scale)
