"""The reference of `MlaAttention` against a loop over single queries in f64."""

import pytest
import torch
from torch import Tensor

from seekforge.plugins.testing import Case, cases, max_error

CASES = cases("MlaAttention")


def naive(case: Case) -> tuple[Tensor, float]:
    """Return the output in f64, and the largest score in size."""
    q_latent, q_pe, cache, table, positions = case.inputs
    out, largest = torch.zeros(q_latent.shape, dtype=torch.float64), 0.0
    for b, row, head in torch.cartesian_prod(*(torch.arange(n) for n in q_latent.shape[:3])).tolist():
        seen = range(int(positions[b, row]) + 1)
        if not seen:
            continue
        keys = torch.stack([cache[int(table[b, s // 64]) * 64 + s % 64] for s in seen]).double()
        query = torch.cat([q_latent[b, row, head], q_pe[b, row, head]]).double()
        scores = keys @ query * case.attrs["scale"]
        largest = max(largest, scores.abs().max().item())
        p = torch.softmax(scores, 0)
        out[b, row, head] = p @ keys[:, : q_latent.shape[-1]]
    return out, largest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_softmax_attention_over_all_positions_up_to_the_token(case: Case) -> None:
    """A score rounded in f32 moves its weight by as much, relatively, and the output by that share of a value."""
    exact, largest = naive(case)
    rounding = torch.finfo(torch.float32).eps * (1 + largest) * case.inputs[2].nan_to_num(0.0).abs().max().item()
    assert max_error(case.expected()[0], exact) <= rounding


def test_a_padded_row_gives_zero() -> None:
    case = next(c for c in CASES if c.name == "nothing-but-padding")
    assert torch.equal(case.expected()[0], torch.zeros_like(case.inputs[0]))
