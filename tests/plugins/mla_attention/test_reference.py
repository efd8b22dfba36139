"""The reference of `MlaAttention` against a loop over single queries in f64."""

import pytest
import torch
from torch import Tensor

from seekforge.plugins.testing import Case, cases, max_error

CASES = cases("MlaAttention")


def naive(case: Case) -> Tensor:
    q_latent, q_pe, cache, table, positions = case.inputs
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    for b, row, head in torch.cartesian_prod(*(torch.arange(n) for n in q_latent.shape[:3])).tolist():
        seen = range(int(positions[b, row]) + 1)
        if not seen:
            continue
        keys = torch.stack([cache[int(table[b, s // 64]) * 64 + s % 64] for s in seen]).double()
        query = torch.cat([q_latent[b, row, head], q_pe[b, row, head]]).double()
        p = torch.softmax(keys @ query * case.attrs["scale"], 0)
        out[b, row, head] = p @ keys[:, : q_latent.shape[-1]]
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_softmax_attention_over_all_positions_up_to_the_token(case: Case) -> None:
    assert max_error(case.expected()[0], naive(case)) < 3e-6


def test_a_padded_row_gives_zero() -> None:
    case = next(c for c in CASES if c.name == "nothing-but-padding")
    assert torch.equal(case.expected()[0], torch.zeros_like(case.inputs[0]))
