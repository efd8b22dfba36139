"""Test vectors of `DsaAttention`. Every slot that no query chose holds NaN, block 0 included."""

from __future__ import annotations

import torch

from seekforge.plugins.testing import Case, Draw

_H, _C, _R = 4, 128, 64


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(4)
    result: list[Case] = []

    def add(name: str, counts: list[list[int]], *, visible: int, topk: int = 16, q_scale: float = 1.0) -> None:
        """`counts` [B][Q]: how many of the first `visible` positions each query has chosen."""
        b, n = len(counts), len(counts[0])
        max_blocks = -(-visible // 64)
        num_blocks = b * max_blocks + 2
        table = draw.block_table(b, max_blocks, num_blocks)
        indices = torch.full((b, n, topk), -1, dtype=torch.int32)
        cache = torch.full((num_blocks * 64, _C + _R), torch.nan)
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                chosen = draw.order(visible)[:count].sort().values
                indices[i, j, :count] = chosen.to(torch.int32)
                slots = table[i].long()[chosen // 64] * 64 + chosen % 64
                cache[slots] = draw.normal(count, _C + _R)
            table[i, int(indices[i].max()) // 64 + 1 :] = 0  # as the runtime leaves entries that it does not need
        q_latent, q_pe = draw.normal(b, n, _H, _C) * q_scale, draw.normal(b, n, _H, _R) * q_scale
        attrs = {"scale": 0.1352337788608801, "kv_format": "f32"}
        result.append(Case("DsaAttention", name, (q_latent, q_pe, cache, table, indices), attrs))

    add("one-token", [[16]], visible=40)
    add("ragged", [[1, 2, 3, 4, 5], [16, 15, 16, 0, 0], [0, 0, 0, 0, 0]], visible=150)
    add("three-single-tokens", [[1], [16], [9]], visible=64)
    add("no-key-at-all", [[0, 0]], visible=10)
    add("one-key-each", [[1, 1, 1]], visible=200)
    add("every-position", [[64, 64]], visible=64, topk=64)
    add("more-columns-than-positions", [[60, 64, 0]], visible=64, topk=128)
    add("peaked-softmax", [[16, 16]], visible=130, q_scale=40.0)
    add("flat-softmax", [[16, 3]], visible=130, q_scale=1e-6)
    return result
