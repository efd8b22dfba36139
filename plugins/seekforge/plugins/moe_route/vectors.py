"""Test vectors of `MoeRoute`."""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.plugins.testing import Case, Draw


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(5)
    result: list[Case] = []

    def add(name: str, logits: Tensor, bias: Tensor, **changed: object) -> None:
        attrs = {"n_group": 4, "topk_group": 2, "top_k": 4, "norm": True, "scale": 2.5} | changed
        result.append(Case("MoeRoute", name, (logits, bias), attrs))

    none = torch.zeros(16)
    add("one-token", draw.normal(1, 16), none)
    add("random", draw.normal(33, 16) * 2, draw.normal(16) * 0.1)
    add("not-normalized", draw.normal(5, 16), draw.normal(16) * 0.1, norm=False)
    add("one-group", draw.normal(5, 16), draw.normal(16) * 0.1, n_group=1, topk_group=1)
    add("all-groups", draw.normal(5, 16), draw.normal(16) * 0.1, topk_group=4)
    add("top-one", draw.normal(5, 16), draw.normal(16) * 0.1, top_k=1, topk_group=1)
    add("as-large-as-v3.2", draw.normal(9, 256), draw.normal(256) * 0.05, n_group=8, topk_group=4, top_k=8)
    # every biased score is negative: a group masked with 0 in place of −inf would win
    add("all-biased-scores-negative", draw.normal(9, 16), draw.uniform(16, low=-3.0, high=-2.0))
    # the bias alone decides; weights must not show it
    add("bias-decides", draw.normal(9, 16), 2 * torch.arange(16.0).flip(0))
    add("all-equal", torch.zeros(3, 16), none)
    ties = draw.integers(9, 16, low=-1, high=2).float()
    add("ties-in-groups-and-experts", ties, none)
    # one outstanding expert per group against pairs: the group's score is the sum of its best two
    pairs = torch.full((1, 16), -8.0)
    pairs[0, [0, 4]], pairs[0, [8, 9, 12, 13]] = 1.0, 0.9
    add("best-two-decide-the-group", pairs, none)
    add("saturated", torch.cat([draw.normal(4, 16) * 30, draw.normal(4, 16).abs() * -30]), draw.normal(16) * 0.1)
    add("far-below-zero", draw.normal(4, 16) * 5 - 40, none)
    return result
