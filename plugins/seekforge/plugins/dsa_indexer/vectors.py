"""Test vectors of `DsaIndexer`.

Tie vectors hold small integers and powers of two: every score is exact in f32 in any order of summation, and exact
in e4m3, so the tie rule (lowest position) alone decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.plugins.testing import Case, Draw

_HEADS, _D = 16, 128


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(3)
    result: list[Case] = []

    def add(
        name: str,
        positions: Tensor,
        *,
        max_blocks: int = 3,
        topk: int = 64,
        fp8: bool = True,
        q: Tensor | None = None,
        w: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> None:
        """`keys` [B, MB·64, D] are put where the block table says; other slots hold NaN."""
        b, n = positions.shape
        num_blocks = b * max_blocks + 2
        table = draw.block_table(b, max_blocks, num_blocks)
        if keys is None:
            keys = draw.normal(b, max_blocks * 64, _D)
        cache = torch.full((num_blocks, 64, _D), torch.nan)
        cache[table.long().flatten()] = keys.reshape(-1, 64, _D)
        for row, last in zip(table, positions.amax(1).tolist(), strict=True):
            row[last // 64 + 1 :] = 0  # as the runtime leaves entries that a sequence does not need
        inputs = (
            draw.normal(b, n, _HEADS, _D) if q is None else q,
            draw.normal(b, n, _HEADS) * (_HEADS * _D) ** -0.5 if w is None else w,
            cache.reshape(-1, _D),
            table,
            positions,
        )
        attrs = {"index_topk": topk, "indexer_fp8": fp8, "index_format": "f32"}
        result.append(Case("DsaIndexer", name, inputs, attrs))

    ragged = torch.tensor([[3, 4, 5, 6, 7], [150, 151, 152, -1, -1], [-1, -1, -1, -1, -1]])
    add("ragged", ragged)
    add("ragged-unquantized", ragged, fp8=False)
    add("one-token", torch.tensor([[100]]))
    add("three-single-tokens", torch.tensor([[0], [191], [64]]))
    add("many-rows", torch.arange(140, 188).reshape(2, 24))  # enough to notice one head weight that is 1 % off
    add("around-topk", torch.tensor([[62, 63, 64, 65]]))
    add("topk-of-all-keys", torch.tensor([[190, 191]]), topk=192)
    add("topk-beyond-the-table", torch.tensor([[5, 127]]), max_blocks=2, topk=256)
    add("topk-one", torch.tensor([[0, 1, 130]]), topk=1)
    add("all-weights-negative", torch.tensor([[180, 181]]), w=-draw.uniform(1, 2, _HEADS, low=0.01, high=0.1))

    late = torch.tensor([[10, 100, 180, 191, 63]])
    ones = torch.ones(1, 5, _HEADS, _D)
    eighths = torch.full((1, 5, _HEADS), 0.125)
    for fp8 in (True, False):
        kind = "fp8" if fp8 else "plain"
        same = torch.ones(1, 192, _D)
        add(f"constant-scores-{kind}", late, q=ones, w=eighths, keys=same, fp8=fp8)
        add(f"all-scores-zero-{kind}", late, q=ones, w=eighths, keys=-same, fp8=fp8)
        levels = draw.integers(1, 192, 1, low=0, high=4).float().expand(1, 192, _D)
        add(f"many-ties-at-rank-k-{kind}", late, q=ones, w=eighths, keys=levels, fp8=fp8)
        add(f"ties-under-negative-weights-{kind}", late, q=ones, w=-eighths, keys=levels, fp8=fp8)

    rubbish = draw.normal(1, 192, _D)
    rubbish[0, 5:80] = torch.nan
    add("nan-keys", late, keys=rubbish.clone())
    rubbish[0, 5:80] = torch.inf
    add("infinite-keys", late, keys=rubbish.clone(), q=draw.normal(1, 5, _HEADS, _D).abs(), w=eighths)
    add("infinite-keys-negative-weights", late, keys=rubbish, q=draw.normal(1, 5, _HEADS, _D).abs(), w=-eighths)
    nan_weights = eighths.clone()
    nan_weights[0, 1, 3] = torch.nan
    add("nan-weight", late, w=nan_weights)
    return result
