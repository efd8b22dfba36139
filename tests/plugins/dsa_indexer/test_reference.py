"""The reference of `DsaIndexer` against Python's own sort, and the rules that its vectors must be able to tell."""

import math

import pytest
import torch
from torch import Tensor

from seekforge.plugins.dsa_indexer.reference import first_best, index_scores
from seekforge.plugins.quant import fake_quantize
from seekforge.plugins.testing import Case, cases

CASES = cases("DsaIndexer")
LARGEST = torch.finfo(torch.float32).max


def naive_scores(case: Case, b: int, row: int) -> list[float]:
    """Score of every visible key of one query, in f64 sums."""
    q, w, cache, table, positions = case.inputs
    heads = fake_quantize(q[b, row]) if case.attrs["indexer_fp8"] else q[b, row]
    scores = []
    for position in range(int(positions[b, row]) + 1):
        key = cache[int(table[b, position // 64]) * 64 + position % 64].double()
        dots = heads.double() @ key
        open_dots = torch.where(dots < 0, 0.0, dots)
        score = float((w[b, row].double() * open_dots).sum())
        scores.append(-LARGEST if math.isnan(score) else min(max(score, -LARGEST), LARGEST))
    return scores


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_picks_the_best_visible_keys(case: Case) -> None:
    (picked,) = case.expected()
    topk = case.attrs["index_topk"]
    for b in range(picked.shape[0]):
        for row in range(picked.shape[1]):
            scores = naive_scores(case, b, row)
            order = sorted(range(len(scores)), key=lambda s: (-scores[s], s))[:topk]
            want = sorted(order) + [-1] * (topk - len(order))
            assert picked[b, row].tolist() == want


@pytest.mark.parametrize("k", [1, 7, 40, 41])
def test_of_equal_scores_those_that_stand_first_are_chosen(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(-2, 3, (50, 40), generator=generator).float()
    scores[scores == 1] = -0.0
    scores[torch.rand(scores.shape, generator=generator) < torch.linspace(0, 1, 50)[:, None]] = -torch.inf
    for row, got in zip(scores.tolist(), first_best(scores, k).tolist(), strict=True):
        ranked = sorted((i for i, score in enumerate(row) if score > -math.inf), key=lambda i: (-row[i], i))
        want = sorted(ranked[:k])
        assert got == want + [-1] * (min(k, 40) - len(want))


def test_index_scores_hide_what_is_not_visible() -> None:
    case = CASES[0]
    scores = index_scores(*case.inputs, True, "f32")
    hidden = torch.arange(scores.shape[-1]) > case.inputs[-1].unsqueeze(-1)
    assert torch.equal(scores == -torch.inf, hidden)
    assert scores[~hidden].isfinite().all()


def picks(case: Case, scores: Tensor) -> Tensor:
    """The selection that given scores lead to, by the rule of the reference."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True)
    k = min(case.attrs["index_topk"], scores.shape[-1])
    return torch.where(order.values[..., :k] > -torch.inf, order.indices[..., :k], -1).sort(-1).values


def bent_head(case: Case) -> Tensor:
    """Scores with the weight of one head 1 % too large."""
    q, w, *rest = case.inputs
    w = w.clone()
    w[..., 0] *= 1.01
    return index_scores(q, w, *rest, case.attrs["indexer_fp8"], "f32")


def sees_one_key_less(case: Case) -> Tensor:
    *rest, positions = case.inputs
    return index_scores(*rest, positions - 1, case.attrs["indexer_fp8"], "f32")


def without_relu(case: Case) -> Tensor:
    q, w, cache, table, positions = case.inputs
    plain = index_scores(q, w, cache, table, positions, case.attrs["indexer_fp8"], "f32")
    mirrored = index_scores(-q, -w, cache, table, positions, case.attrs["indexer_fp8"], "f32")
    return plain + mirrored  # Σ w·relu(d) − Σ w·relu(−d) = Σ w·d


def highest_wins_ties(case: Case) -> Tensor:
    scores = index_scores(*case.inputs, case.attrs["indexer_fp8"], "f32")
    return scores + torch.arange(scores.shape[-1]) * 1e-4


@pytest.mark.parametrize("wrong", [bent_head, sees_one_key_less, without_relu, highest_wins_ties])
def test_the_vectors_notice_a_wrong_score(wrong) -> None:
    def right(case: Case) -> Tensor:
        return picks(case, index_scores(*case.inputs, case.attrs["indexer_fp8"], "f32"))

    assert any(not torch.equal(picks(case, wrong(case)), right(case)) for case in CASES)
