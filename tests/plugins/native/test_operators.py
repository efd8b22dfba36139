"""The CPU operators of the compiled library against the references, vector by vector; the model then has no bodies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seekforge.plugins.dsa_attention.reference import dsa_attention
from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.mla_attention.reference import mla_attention
from seekforge.plugins.registry import NATIVE
from seekforge.plugins.testing import SCRAP, Case, Draw, cases, equal_bits, max_error, run_function, same_selection

F32 = Specialization("f32", "float8", "f32", "ort")
#: f32 softmax and sums in another order; a scale bent by 1 % moves the results by 1e-3 and more.
TOLERANCE = 3e-6
ATTENTION = {"DsaAttention": dsa_attention, "MlaAttention": mla_attention}


def assert_same(case: Case, outputs: tuple[torch.Tensor, ...]) -> None:
    """Compare results with those of the reference, as the tests of the bodies do; attention with it in f64."""
    if case.op in ATTENTION:  # in f32 the reference of a peaked softmax is further from it than the operators are
        queries = (tensor.double() for tensor in case.inputs[:2])
        assert max_error(outputs[0], ATTENTION[case.op](*queries, *case.inputs[2:], **case.attrs)) < TOLERANCE
        return
    expected = case.expected()
    if case.op == "DsaIndexer":
        q, w, cache, table, positions = case.inputs
        scores = index_scores(q, w, cache, table, positions, bool(case.attrs["indexer_fp8"]), "f32")
        assert same_selection(outputs[0], expected[0], scores, 1e-6)
        seen = torch.where(outputs[0] < 0, 2**30, outputs[0])
        assert torch.equal(seen, seen.sort(dim=-1).values), "ascending, -1 last"
        return
    if case.op.endswith("CacheWrite"):
        for out, wanted in zip(outputs, expected, strict=True):
            assert equal_bits(out[SCRAP:], wanted[SCRAP:])
        return
    if case.op == "MoeRoute":
        assert torch.equal(outputs[0], expected[0])
        assert max_error(outputs[1], expected[1]) < TOLERANCE
        return
    assert max_error(outputs[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize("case", cases(*NATIVE), ids=str)
def test_an_operator_computes_the_reference(case: Case, library: Path) -> None:
    typed = case.typed(F32)
    assert_same(typed, run_function(case.op, typed.inputs, typed.attrs, F32, library=library))


def indexer_case(num_tokens: int, blocks: int, *, heads: int = 6, topk: int = 100) -> Case:
    """The last tokens of one sequence whose table is full."""
    draw = Draw(blocks)
    table = draw.block_table(1, blocks, blocks + 2)
    cache = draw.normal((blocks + 2) * 64, 128)
    positions = torch.arange(blocks * 64 - num_tokens, blocks * 64)[None]
    inputs = (draw.normal(1, num_tokens, heads, 128), draw.normal(1, num_tokens, heads), cache, table, positions)
    return Case("DsaIndexer", "long", inputs, {"index_topk": topk, "indexer_fp8": False, "index_format": "f32"})


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 40), (3, 40), (20, 12)])
def test_threads_that_share_a_selection_find_the_same(num_tokens: int, blocks: int, library: Path) -> None:
    case = indexer_case(num_tokens, blocks)
    (one,) = run_function(case.op, case.inputs, case.attrs, F32, library=library)
    (two,) = run_function(case.op, case.inputs, case.attrs, F32, library=library, threads=2)
    assert torch.equal(one, two)
    assert_same(case, (two,))


@pytest.mark.parametrize("step", [2.0**-23, 2.0**-10, 1.0])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_scores_that_differ_in_any_bit_are_told_apart(step: float, weight: float, library: Path) -> None:
    """A score is the first value of its key, times the weight: some equal, the others one step apart."""
    q, w, cache, table, positions = indexer_case(1, 12, heads=1).inputs
    where = table[0].long().repeat_interleave(64) * 64 + torch.arange(64).repeat(12)
    cache[where, 0] = 1 + Draw(1).order(768) // 3 * step
    inputs = (
        torch.zeros_like(q).index_fill_(3, torch.tensor(0), 1.0),
        torch.full_like(w, weight),
        cache,
        table,
        positions,
    )
    case = Case("DsaIndexer", "near", inputs, {"index_topk": 100, "indexer_fp8": False, "index_format": "f32"})
    (found,) = run_function(case.op, case.inputs, case.attrs, F32, library=library)
    assert torch.equal(found, case.expected()[0])


def attention_case(heads: int, latent: int, rope: int) -> Case:
    """Two tokens of one sequence that chose 130 and 7 keys; other rows of the cache are NaN."""
    draw = Draw(heads)
    table = draw.block_table(1, 4, 6)
    cache = torch.full((6 * 64, latent + rope), torch.nan)
    chosen = torch.full((1, 2, 160), -1, dtype=torch.int32)
    for token, count in enumerate((130, 7)):
        where = draw.order(256)[:count].sort().values
        chosen[0, token, :count] = where.int()
        cache[table[0].long()[where // 64] * 64 + where % 64] = draw.normal(count, latent + rope)
    inputs = (draw.normal(1, 2, heads, latent), draw.normal(1, 2, heads, rope), cache, table, chosen)
    return Case("DsaAttention", "odd", inputs, {"scale": 0.1, "kv_format": "f32"})


@pytest.mark.parametrize(("heads", "latent", "rope"), [(16, 256, 64), (1, 128, 64), (5, 72, 10), (11, 6, 3)])
def test_sizes_that_fill_no_vector(heads: int, latent: int, rope: int, library: Path) -> None:
    case = attention_case(heads, latent, rope)
    assert_same(case, run_function(case.op, case.inputs, case.attrs, F32, library=library, threads=2))


def test_no_key_wherever_it_stands_is_no_key(library: Path) -> None:
    q_latent, q_pe, cache, table, chosen = attention_case(4, 64, 16).inputs
    mixed = torch.cat([chosen[..., 100:], chosen[..., :100]], dim=-1)
    case = Case("DsaAttention", "mixed", (q_latent, q_pe, cache, table, mixed), {"scale": 0.1, "kv_format": "f32"})
    assert_same(case, run_function(case.op, case.inputs, case.attrs, F32, library=library))


@pytest.mark.parametrize("bad", ["block", "position", "slot", "scrap of no cache"])
def test_an_index_outside_a_cache_is_an_error(bad: str, library: Path) -> None:
    """What a step says is checked before memory is read: nothing from outside is trusted."""
    q_latent, q_pe, cache, table, chosen = attention_case(4, 64, 16).inputs
    op, attrs, inputs = "DsaAttention", {"scale": 0.1, "kv_format": "f32"}, [q_latent, q_pe, cache, table, chosen]
    if bad == "block":
        inputs[3] = table.clone()
        inputs[3][0, 2] = 6
    elif bad == "position":
        inputs[4] = chosen.clone()
        inputs[4][0, 1, 0] = 256
    else:
        op, attrs = "MlaCacheWrite", {"kv_format": "f32", "kv_fp8": False}
        slot = 6 * 64
        if bad != "slot":
            cache, slot = cache[:0], -1
        inputs = [cache, torch.zeros(1, 1, 64), torch.zeros(1, 1, 16), torch.tensor([[slot]])]
    with pytest.raises(Exception, match=f"{op}.*that the (cache|block table) has not"):
        run_function(op, inputs, attrs, F32, library=library)
