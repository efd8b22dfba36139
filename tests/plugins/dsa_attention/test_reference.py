"""The reference of `DsaAttention` against a loop over single queries in f64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from seekforge.plugins.quant import pack_latent
from seekforge.plugins.testing import Case, cases, max_error

CASES = cases("DsaAttention")


def naive(case: Case) -> Tensor:
    q_latent, q_pe, cache, table, indices = case.inputs
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    for b, row, head in torch.cartesian_prod(*(torch.arange(n) for n in q_latent.shape[:3])).tolist():
        chosen = [s for s in indices[b, row].tolist() if s >= 0]
        if not chosen:
            continue
        keys = torch.stack([cache[int(table[b, s // 64]) * 64 + s % 64] for s in chosen]).double()
        query = torch.cat([q_latent[b, row, head], q_pe[b, row, head]]).double()
        p = torch.softmax(keys @ query * case.attrs["scale"], 0)
        out[b, row, head] = p @ keys[:, : q_latent.shape[-1]]
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_softmax_attention_over_the_chosen_rows(case: Case) -> None:
    assert max_error(case.expected()[0], naive(case)) < 3e-6


def test_a_query_without_keys_gives_zero() -> None:
    case = next(c for c in CASES if c.name == "no-key-at-all")
    assert torch.equal(case.expected()[0], torch.zeros_like(case.inputs[0]))


def test_the_order_of_the_indices_does_not_matter() -> None:
    case = next(c for c in CASES if c.name == "ragged")
    flipped = dataclasses.replace(case, inputs=(*case.inputs[:4], case.inputs[4].flip(-1)))
    assert max_error(flipped.expected()[0], case.expected()[0]) < 3e-6


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_scale_bent_by_one_percent_is_noticed(factor: float) -> None:
    case = next(c for c in CASES if c.name == "ragged")
    bent = dataclasses.replace(case, attrs=case.attrs | {"scale": case.attrs["scale"] * factor})
    assert max_error(bent.expected()[0], case.expected()[0]) > 1e-4


def test_byte_records_read_like_their_dequantized_rows() -> None:
    case = next(c for c in CASES if c.name == "every-position")
    q_latent, q_pe, cache, table, indices = case.inputs
    cache = cache.nan_to_num(0.0)
    records = pack_latent(cache[:, :128], cache[:, 128:])
    packed = dataclasses.replace(
        case,
        inputs=(q_latent, q_pe, records.reshape(-1, 64, records.shape[-1]), table, indices),
        attrs=case.attrs | {"kv_format": "fp8_ds"},
    )
    from seekforge.plugins.quant import fake_quantize

    rows = torch.cat([fake_quantize(cache[:, :128]), cache[:, 128:].bfloat16().float()], -1)
    plain = dataclasses.replace(case, inputs=(q_latent, q_pe, rows, table, indices))
    assert torch.equal(packed.expected()[0], plain.expected()[0])
