"""The small parts: embedding, norms, linears, the two RoPE layouts, SwiGLU. Roundings as in spec §3 and §4."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.ops import aten_decompositions, rotary_embedding

from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.plugins.block_fp8_linear.op import block_fp8_linear
from seekforge.plugins.operator import cdiv
from seekforge.plugins.sum_ranks.op import sum_ranks

#: What `rotary_embedding` computes. Called as an operator it imports torch's compiler first, which takes seconds.
_ROTARY_EMBEDDING: Final = aten_decompositions()[torch.ops.onnx.RotaryEmbedding.opset23]


def weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized parameter that takes no gradient; filled by `weights.load_weights`."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class RmsNorm(nn.Module):
    """RMSNorm with f32 inside; optionally adds a residual first and norms the unrounded sum."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = weight(size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return w · x / rms(x): [..., size], dtype of `x`."""
        return F.rms_norm(x.float(), (self.size,), self.weight.float(), self.eps).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm of x + residual, x + residual), both rounded once to the dtype of `x`.

        The norm sees the unrounded f32 sum (spec §3.1, HF); transformers rounds the sum first.
        """
        total = x.float() + residual.float()
        return F.rms_norm(total, (self.size,), self.weight.float(), self.eps).to(x.dtype), total.to(x.dtype)


class Fp8Linear(nn.Module):
    """y = x · Wᵀ with W in FP8 128×128 blocks, or kept in a wider type (`BlockFp8Linear`)."""

    def __init__(
        self, in_features: int, out_features: int, act_quant: str, dtype: torch.dtype = torch.float8_e4m3fn
    ) -> None:
        super().__init__()
        self.act_quant = act_quant
        self.weight = weight(out_features, in_features, dtype=dtype)
        blocks = (cdiv(out_features, FP8_BLOCK), cdiv(in_features, FP8_BLOCK))
        self.weight_scale = weight(*blocks, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features], dtype of `x`."""
        return block_fp8_linear(x, self.weight, self.weight_scale, self.act_quant)


class LinearF32(nn.Module):
    """y = f32(x) · f32(W)ᵀ, for the router, the indexer's head weights and the LM head (spec §5.3)."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(out_features, in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] f32."""
        return product(x, self.weight.float().T)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · W with all axes of x but the last as one, so that no axis of W has to be made up.

    TensorRT may otherwise repeat W along them. `eh_proj` of one token was copied whole, 205 MB.

    Args:
        x: [..., K], multiplied in the dtype of the weight. weight: [K, N].

    Returns:
        [..., N], dtype of `weight`.
    """
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    y = rows.to(weight.dtype) @ weight
    return y.unflatten(0, x.shape[:-1]) if x.dim() > 2 else y


def product_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · W of every head; sequences and their tokens are one axis.

    TensorRT repeats a weight that is an input along any axis before the heads: as [B, heads, Q, K] · [heads, K, N] the
    product held B copies of W, 17 MB each at DeepSeek-V3.2's sizes.

    Args:
        x: [B·Q, heads, K].
        weight: [heads, K, N], dtype of `x`.

    Returns:
        [B·Q, heads, N], dtype of `x`.
    """
    return (x.transpose(0, 1) @ weight).transpose(0, 1)


def fp8_linear(settings: Settings, in_features: int, out_features: int) -> Fp8Linear:
    """Return the linear of a weight that is FP8 in the checkpoint."""
    return Fp8Linear(in_features, out_features, settings.numerics.act_quant, settings.weight_dtype)


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int = 1) -> Tensor:
    """Rotate pairs (2i, 2i+1), the layout of the main attention (spec §3.2).

    Args:
        x: [B, Q, num_heads · D]; the first R of each head's D turn, the others stay.
        cos, sin: [B, Q, R / 2] f32.

    Returns:
        Shape and dtype of `x`; computed in f32.
    """
    return _rope(x, cos, sin, num_heads, interleaved=True)


def rope_half_split(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int = 1) -> Tensor:
    """Rotate pairs (i, i + R/2), the layout of the indexer and only of the indexer (spec §3.2, P1).

    Args, returns: as `rope_interleaved`.
    """
    return _rope(x, cos, sin, num_heads, interleaved=False)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *, interleaved: bool) -> Tensor:
    """RoPE as the one operator that ONNX has for it: written out, it was a third of a program's nodes."""
    rotate = rotary_embedding if torch.compiler.is_exporting() else _ROTARY_EMBEDDING
    turned = rotate(
        x.float(),
        cos,
        sin,
        interleaved=interleaved,
        num_heads=num_heads,
        rotary_embedding_dim=2 * cos.shape[-1],
    )
    return turned.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up of [..., gate | up], formed in f32 and rounded once (spec §4)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


class SumRanks(nn.Module):
    """Sum over the tensor-parallel ranks (`SumRanks`); nothing for one rank."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.num_ranks = num_ranks

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        return x if self.num_ranks == 1 else sum_ranks(x, self.num_ranks)


class Mlp(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up as one product."""

    def __init__(self, settings: Settings, intermediate_size: int) -> None:
        super().__init__()
        hidden_size = settings.config.hidden_size
        self.gate_up_proj = fp8_linear(settings, hidden_size, 2 * intermediate_size)
        self.down_proj = fp8_linear(settings, intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Embedding(nn.Module):
    """Token embedding, [rows of the rank, hidden_size].

    Ranks that divide the vocabulary look up what they have and give zeros for other tokens, and put their logits in
    their place among zeros (`all_logits`). Sums over ranks make both whole, to the bit: whatever is added to a value is
    zero. So all ranks go on with the same numbers, and `SumRanks` stays the one collective of a program.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.num_ranks = settings.parallelism.tp
        self.weight = weight(settings.rank.vocab_size, settings.config.hidden_size, dtype=settings.dtype)

    def forward(self, ids: Tensor, vocab_start: Tensor | None = None) -> Tensor:
        """[B, Q] int64 -> [B, Q, hidden_size].

        Args:
            ids: the tokens.
            vocab_start: [1] int32, the token of the first row; None: all rows are here.
        """
        if vocab_start is None:
            return F.embedding(ids, self.weight)
        wanted = ids - vocab_start.long()
        row = wanted.clamp(0, self.weight.shape[0] - 1)
        is_here = (row == wanted).unsqueeze(-1).to(self.weight.dtype)
        return sum_ranks(F.embedding(row, self.weight) * is_here, self.num_ranks)


def all_logits(part: Tensor, vocab_start: Tensor, settings: Settings) -> Tensor:
    """Return the logits [N, vocab_size] f32 of all ranks.

    Args:
        part: [N, rows of the rank] f32, the rank's logits.
        vocab_start: [1] int32, the token of the first of them.
        settings: how the model is divided.
    """
    ranks, size = settings.parallelism.tp, settings.rank.vocab_size
    place = torch.arange(0, ranks * size, size, dtype=torch.int32)
    is_mine = (place == vocab_start).to(part.dtype)
    spread = part.unsqueeze(1) * is_mine.unsqueeze(-1)
    return sum_ranks(spread.reshape(-1, ranks * size), ranks)
