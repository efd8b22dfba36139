"""What ranks have of a mixture of experts is added up in the type of hidden states, for a rounding more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models.shared.moe import Moe
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.tolerances import PERTURBATION_BF16
from seekforge.formats.numerics import EXACT


class _Recorded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Tensor] = []

    def forward(self, part: Tensor) -> Tensor:
        self.parts.append(part)
        return part


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_a_sum_in_bf16_costs_no_more_than_two_roundings(num_ranks: int) -> None:
    """Partial sums rounded to bf16, and rounded again after each addition, against one sum in f32: by root mean
    squares, twice what parity takes for the noise of a bf16 engine."""
    config = load_preset("tiny").config
    torch.manual_seed(0)
    moe = Moe(Settings(config, EXACT, "bf16"))
    with torch.no_grad():
        for name, value in moe.named_parameters():
            drawn = torch.ones(value.shape) if name.endswith("scale") else torch.randn(value.shape) / 16
            value.copy_(drawn.to(value.dtype))
        for value in moe.shared_experts.parameters():
            value.zero_()  # each rank has a part of it; here all of it is on none
        recorded = _Recorded()
        moe.add_module("sum_ranks", recorded)
        x = torch.randn(1, 24, config.hidden_size).to(torch.bfloat16)
        owners = torch.arange(config.n_routed_experts) % num_ranks
        numbers = torch.arange(config.n_routed_experts, dtype=torch.int32)
        for rank in range(num_ranks):
            moe(x, torch.where(owners == rank, numbers, -1).to(torch.int32))
        moe(x)
    *parts, whole = recorded.parts
    assert {part.dtype for part in recorded.parts} == {torch.bfloat16}
    added = parts[0]
    for part in parts[1:]:
        added = added + part
    expected = whole.float()
    error = (added.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 2 * PERTURBATION_BF16, float(error)
