"""Modules whose weights are codes: what an int8 or int4 engine computes, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seekforge.exporter.models.shared.layers import Fp8Linear, LinearF32, swiglu, weight
from seekforge.exporter.models.shared.moe import Experts
from seekforge.exporter.models.shared.settings import Settings


def use_codes(model: nn.Module, settings: Settings) -> None:
    """Put modules with codes in the place of those of `model` whose weights are codes by `settings.quantization`."""
    how = settings.quantization
    if how is None:
        return
    for name, module in list(model.named_modules()):
        made: nn.Module | None = None
        if isinstance(module, Fp8Linear | LinearF32) and how.bits(f"{name}.weight"):
            out_features, in_features = module.weight.shape
            made = CodedLinear(in_features, out_features, how.block_size)
        elif isinstance(module, Experts) and how.bits(f"{name}.w13"):
            num_experts, hidden_size, intermediate_size = module.w2.shape
            made = CodedExperts(num_experts, hidden_size, intermediate_size, how.block_size)
        if made is not None:
            model.set_submodule(name, made)


class CodedLinear(nn.Module):
    """y = x · Wᵀ with W in codes of 8 or 4 bits and x rounded to int8, as int8 and int4 engines multiply."""

    def __init__(self, in_features: int, out_features: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.weight = weight(out_features, in_features, dtype=torch.int8)
        self.weight_scale = weight(out_features, in_features // block_size, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features], dtype of `x`."""
        return coded_product(x, self.weight, self.weight_scale, self.block_size)


def coded_product(x: Tensor, codes: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Return x · Wᵀ of [..., K] and W = codes [N, K] int8 times scales [N, K / block_size], with x rounded to int8."""
    decoded = (codes.float().unflatten(-1, (-1, block_size)) * scales.unsqueeze(-1)).flatten(-2)
    return (round_to_int8(x.float(), block_size) @ decoded.T).to(x.dtype)


def round_to_int8(x: Tensor, block_size: int) -> Tensor:
    """Round [..., K] f32 to int8 with one scale per block, largest magnitude / 127, and back.

    Source: ONNX Runtime 1.32, MatMulNBits with accuracy_level 4; checked to 4e-7 of its products' root mean square.
    """
    blocks = x.unflatten(-1, (-1, block_size))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0.0))
    return (codes * (largest / 127)).flatten(-2)


class CodedExperts(nn.Module):
    """`Experts` with weights in codes of 8 or 4 bits (see `CodedLinear`), for one rank."""

    def __init__(self, experts: int, hidden: int, inter: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.w13 = weight(experts, 2 * inter, hidden, dtype=torch.int8)
        self.w13_scale = weight(experts, 2 * inter, hidden // block_size, dtype=torch.float32)
        self.w2 = weight(experts, hidden, inter, dtype=torch.int8)
        self.w2_scale = weight(experts, hidden, inter // block_size, dtype=torch.float32)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """[T, hidden_size] -> weighted sum of the chosen experts, [T, hidden_size] f32."""
        y = torch.zeros_like(x, dtype=torch.float32)
        for e in expert_ids.unique().tolist():
            rows, column = torch.nonzero(expert_ids == e, as_tuple=True)
            hidden = swiglu(coded_product(x[rows], self.w13[e], self.w13_scale[e], self.block_size))
            out = coded_product(hidden, self.w2[e], self.w2_scale[e], self.block_size)
            y[rows] += out.float() * expert_weights[rows, column, None]
        return y
