"""The reference of `DsaCacheWrite` against plain loops; the fp8_ds bytes are in test_quant.py."""

import pytest
import torch

from seekforge.common.errors import ShapeError
from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.quant import fake_quantize
from seekforge.plugins.testing import SCRAP, Case, cases, equal_bits


@pytest.mark.parametrize("case", cases("DsaCacheWrite"), ids=str)
def test_rows_go_to_their_slots_and_nothing_else_changes(case: Case) -> None:
    latent, index, c, k_pe, index_k, slots = case.inputs
    want_latent, want_index = latent.clone(), index.clone()
    for b in range(slots.shape[0]):
        for q in range(slots.shape[1]):
            slot = int(slots[b, q])
            if slot < 0:
                continue
            row_c = fake_quantize(c[b, q]) if case.attrs["kv_fp8"] else c[b, q]
            row_k = fake_quantize(index_k[b, q]) if case.attrs["indexer_fp8"] else index_k[b, q]
            want_latent[slot] = torch.cat([row_c, k_pe[b, q]])
            want_index[slot] = row_k
    got = case.expected()
    assert all(equal_bits(a[SCRAP:], b[SCRAP:]) for a, b in zip(got, (want_latent, want_index), strict=True))
    assert equal_bits(case.inputs[0], latent), "the inputs must not change: torch operators are functional"


def test_padding_changes_no_byte_outside_block_0() -> None:
    case = next(c for c in cases("DsaCacheWrite") if c.name.startswith("nothing"))
    for before, after in zip(case.inputs[:2], case.expected(), strict=True):
        assert equal_bits(before[SCRAP:], after[SCRAP:])


@pytest.mark.parametrize(("kv_fp8", "indexer_fp8", "words"), [(False, True, "kv_fp8"), (True, False, "indexer_fp8")])
def test_byte_layouts_need_their_quantization(kv_fp8: bool, indexer_fp8: bool, words: str) -> None:
    latent, pages = torch.zeros(2, 64, 656, dtype=torch.int8), torch.zeros(2, 64 * 132, dtype=torch.int8)
    c, k_pe, k = torch.zeros(1, 1, 512), torch.zeros(1, 1, 64), torch.zeros(1, 1, 128)
    with pytest.raises(ShapeError, match=words):
        dsa_cache_write(latent, pages, c, k_pe, k, torch.tensor([[64]]), "fp8_ds", "fp8_ds", kv_fp8, indexer_fp8)
