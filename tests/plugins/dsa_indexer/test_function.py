"""Bodies of `DsaIndexer` in ONNX Runtime against the reference: the same positions in the same order."""

import pytest
import torch

from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.specialisation import Specialisation
from seekforge.plugins.testing import Case, cases, run_function, same_selection

HOWS = [Specialisation("f32", "float8", kv, bodies) for kv in ("f32", "bf16") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.kv_format}")
@pytest.mark.parametrize("case", cases("DsaIndexer"), ids=str)
def test_body_picks_what_the_reference_picks(case: Case, how: Specialisation) -> None:
    typed = case.typed(how)
    (got,), (want,) = run_function(case.op, typed.inputs, typed.attrs, how), typed.expected()
    scores = index_scores(*typed.inputs, typed.attrs["indexer_fp8"], typed.attrs["index_format"])
    # a near-tie at rank k may fall either way; 1e-6 of the spread is the noise of an f32 sum over 16 heads of 128
    assert same_selection(got, want, scores, 1e-6)
    if "ties" in case.name or "constant" in case.name or "zero" in case.name:
        assert torch.equal(got, want)
    real = got >= 0
    assert torch.equal(real, real.int().sort(dim=-1, descending=True).values.bool()), "−1 comes last"
    filled = got.long().masked_fill(~real, 2**40)
    assert torch.equal(filled, filled.sort(-1).values), "positions ascend"
