"""Bodies of `DsaIndexer` in ONNX Runtime against the reference: the same positions in the same order."""

import pytest
import torch

from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, Draw, cases, run_function, same_selection

HOWS = [Specialization("f32", "float8", kv, bodies) for kv in ("f32", "bf16") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.kv_format}")
@pytest.mark.parametrize("case", cases("DsaIndexer"), ids=str)
def test_body_picks_what_the_reference_picks(case: Case, how: Specialization) -> None:
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


@pytest.mark.parametrize("blocks", (1, 2))
def test_short_tables_are_answered_without_reading_a_key(blocks: int) -> None:
    """With at most index_topk slots in the tables everything visible is picked, whatever the keys hold."""
    how = Specialization("f32", "float8", "f32", "ort")
    attrs = {"index_topk": 64, "indexer_fp8": False, "index_format": "f32"}
    draw = torch.Generator().manual_seed(0)
    q, w = torch.randn(1, 1, 2, 128, generator=draw), torch.randn(1, 1, 2, generator=draw)
    cache = torch.randn(3 * 64, 128, generator=draw)
    table = torch.tensor([[2, 1][:blocks]], dtype=torch.int32)
    position = torch.tensor([[40]])
    (got,) = run_function("DsaIndexer", (q, w, cache, table, position), attrs, how)
    (blind,) = run_function("DsaIndexer", (q, w, cache[:0], table, position), attrs, how) if blocks == 1 else (got,)
    assert torch.equal(got, blind)
    assert got[0, 0].tolist() == [*range(41), *[-1] * 23]


def test_long_prompts_go_in_blocks() -> None:
    """Blocks of rows that see few keys, that see many, and one that is part full, of two sequences."""
    how = Specialization("f32", "float8", "f32", "ort")
    attrs = {"index_topk": 64, "indexer_fp8": False, "index_format": "f32"}
    draw = Draw(5)
    q, w = draw.normal(2, 150, 4, 128), draw.normal(2, 150, 4)
    cache, table = draw.normal(10 * 64, 128), draw.block_table(2, 4, 10)
    positions = torch.stack([torch.arange(150), torch.arange(100, 250)])
    inputs = (q, w, cache, table, positions)
    (got,) = run_function("DsaIndexer", inputs, attrs, how)
    (want,) = Case("DsaIndexer", "long", inputs, attrs).expected()
    assert same_selection(got, want, index_scores(*inputs, False, "f32"), 1e-6)
    seen = positions.clamp(max=63) + 1
    assert torch.equal((got >= 0).sum(-1), seen)
