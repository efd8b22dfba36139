"""The reference of `MlaCacheWrite` against a loop over single tokens."""

import pytest
import torch

from seekforge.plugins.quant import fake_quantize
from seekforge.plugins.testing import SCRAP, Case, cases


@pytest.mark.parametrize("case", cases("MlaCacheWrite"), ids=str)
def test_each_token_is_written_to_its_slot_and_nothing_else_changes(case: Case) -> None:
    cache, c, k_pe, slots = case.inputs
    want = cache.clone()
    c = fake_quantize(c) if case.attrs["kv_fp8"] else c
    for b, row in torch.cartesian_prod(*(torch.arange(n) for n in slots.shape)).tolist():
        if slots[b, row] >= 0:
            want[slots[b, row]] = torch.cat([c[b, row], k_pe[b, row]])
    assert torch.equal(case.expected()[0][SCRAP:], want[SCRAP:])
