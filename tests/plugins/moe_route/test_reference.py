"""The reference of `MoeRoute` against plain Python in f64, and the faults that its vectors must be able to tell."""

import math

import pytest
import torch
from torch import Tensor

from seekforge.plugins.testing import Case, cases, max_error

CASES = cases("MoeRoute")


def naive(logits: list[float], bias: list[float], attrs: dict) -> tuple[list[int], list[float]]:
    # rounded to f32 where the operator is: scores that f32 cannot tell apart are ties
    scores = [float(torch.tensor(1 / (1 + math.exp(-v)))) for v in logits]
    biased = [float(torch.tensor(s) + torch.tensor(b)) for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // attrs["n_group"]
    members = [range(g * size, (g + 1) * size) for g in range(attrs["n_group"])]
    group = [float(torch.tensor(sorted((biased[e] for e in m), reverse=True)[:2]).sum()) for m in members]
    kept = sorted(range(len(group)), key=lambda g: (-group[g], g))[: attrs["topk_group"]]
    allowed = sorted(e for g in kept for e in members[g])
    picked = sorted(allowed, key=lambda e: (-biased[e], e))[: attrs["top_k"]]
    total = sum(scores[e] for e in picked) if attrs["norm"] else 1.0
    return picked, [attrs["scale"] * scores[e] / total for e in picked]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_group_limited_selection(case: Case) -> None:
    logits, bias = case.inputs
    want = [naive(row, bias.tolist(), case.attrs) for row in logits.tolist()]
    ids, weights = case.expected()
    assert ids.tolist() == [w[0] for w in want]
    assert max_error(weights, torch.tensor([w[1] for w in want])) < 1e-6


def route(case: Case, *, masked: float = -math.inf, best: int = 2, weigh_biased: bool = False) -> tuple[Tensor, Tensor]:
    """A router with a fault."""
    logits, bias = case.inputs
    attrs = case.attrs
    scores = torch.sigmoid(logits)
    groups = (scores + bias).unflatten(-1, (attrs["n_group"], -1))
    group = groups.sort(dim=-1, descending=True).values[..., :best].sum(-1)
    kept = group.sort(dim=-1, descending=True, stable=True).indices[:, : attrs["topk_group"]]
    mask = torch.zeros_like(group, dtype=torch.bool).scatter(1, kept, True)
    flat = groups.masked_fill(~mask.unsqueeze(-1), masked).flatten(1)
    ids = flat.sort(dim=-1, descending=True, stable=True).indices[:, : attrs["top_k"]]
    weights = torch.gather(scores + bias if weigh_biased else scores, 1, ids)
    if attrs["norm"]:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights * attrs["scale"]


def differs(case: Case, got: tuple[Tensor, Tensor]) -> bool:
    ids, weights = case.expected()
    return not torch.equal(got[0], ids) or max_error(got[1], weights) > 1e-5


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"masked": 0.0}, "all-biased-scores-negative"),
        ({"best": 1}, "best-two-decide-the-group"),
        ({"weigh_biased": True}, "bias-decides"),
    ],
)
def test_the_vectors_notice_a_known_fault(fault: dict, name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    assert not differs(case, route(case))
    assert differs(case, route(case, **fault))
