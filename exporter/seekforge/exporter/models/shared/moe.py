"""Mixture of experts: FP32 router, routed experts, and the shared expert that is always on (spec §4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seekforge.exporter.models.shared.layers import LinearF32, Mlp, SumRanks, weight
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.plugins.moe_experts.op import moe_experts
from seekforge.plugins.moe_route.op import moe_route


class Gate(LinearF32):
    """Router logits in f32, and the bias that selects but never weighs."""

    def __init__(self, settings: Settings) -> None:
        config = settings.config
        super().__init__(config.hidden_size, config.n_routed_experts, settings.dtype)
        self.e_score_correction_bias = weight(config.n_routed_experts, dtype=torch.float32)

    def biased_scores(self, logits: Tensor) -> Tensor:
        """[T, n_routed_experts] router logits -> the scores by which experts are chosen."""
        return torch.sigmoid(logits) + self.e_score_correction_bias


class Experts(nn.Module):
    """Stacked expert weights: w13 [E, gate | up, hidden], w2 [E, hidden, inter]; or rows of NVFP4, int8."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = settings.config
        self.act_quant = settings.numerics.act_quant
        hidden = config.hidden_size
        experts, inter = settings.rank.n_routed_experts, settings.rank.moe_intermediate_size
        h, i = hidden // FP8_BLOCK, inter // FP8_BLOCK
        nvfp4 = settings.nvfp4_experts
        dtype = torch.int8 if nvfp4 else settings.weight_dtype
        self.w13 = weight(experts, 2 * inter, row_bytes(hidden) if nvfp4 else hidden, dtype=dtype)
        self.w13_scale = weight(experts, 2 * i, h, dtype=torch.float32)
        self.w2 = weight(experts, hidden, row_bytes(inter) if nvfp4 else inter, dtype=dtype)
        self.w2_scale = weight(experts, h, i, dtype=torch.float32)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """[T, hidden_size] -> weighted sum of the chosen experts, [T, hidden_size] f32."""
        return moe_experts(
            x, expert_ids, expert_weights, self.w13, self.w13_scale, self.w2, self.w2_scale, self.act_quant
        )


class Moe(nn.Module):
    """Routed experts plus shared expert."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = settings.config
        self.config = config
        self.gate = Gate(settings)
        self.experts: nn.Module = Experts(settings)
        self.shared_experts = Mlp(settings, settings.rank.shared_intermediate_size)
        self.sum_ranks = SumRanks(settings.parallelism.tp)

    def forward(self, x: Tensor, expert_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, Q, hidden_size] -> the same, and expert_ids [B·Q, num_experts_per_tok] int32.

        With an `expert_map`, only the experts of this rank are run; the others' parts come with the sum over ranks.
        """
        config = self.config
        tokens = x.flatten(0, 1)
        expert_ids, expert_weights = moe_route(
            self.gate(tokens),
            self.gate.e_score_correction_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        here = expert_ids if expert_map is None else expert_map[expert_ids.long()]
        routed = self.experts(tokens, here, expert_weights)
        y = (routed + self.shared_experts(tokens).float()).to(x.dtype)
        # over ranks go numbers of the hidden states' type: half the bytes of f32 where that is bf16
        return self.sum_ranks(y).view_as(x), expert_ids
