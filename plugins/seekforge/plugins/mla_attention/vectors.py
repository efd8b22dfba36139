"""Test vectors of `MlaAttention`. Every slot that no query sees holds NaN, block 0 included."""

from __future__ import annotations

import torch

from seekforge.plugins.testing import Case, Draw

_H, _C, _R = 4, 128, 64


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(14)
    result: list[Case] = []

    def add(name: str, positions: list[list[int]], *, q_scale: float = 1.0) -> None:
        """`positions` [B][Q]: where each query stands; −1 pads."""
        at = torch.tensor(positions)
        b, n = at.shape
        max_blocks = max(1, int(at.max()) // 64 + 1)
        num_blocks = b * max_blocks + 2
        table = draw.block_table(b, max_blocks, num_blocks)
        cache = torch.full((num_blocks * 64, _C + _R), torch.nan)
        for i in range(b):
            seen = torch.arange(int(at[i].max()) + 1)
            slots = table[i].long()[seen // 64] * 64 + seen % 64
            cache[slots] = draw.normal(len(seen), _C + _R)
            table[i, len(seen) // 64 + 1 :] = 0  # as the runtime leaves entries that it does not need
        q_latent, q_pe = draw.normal(b, n, _H, _C) * q_scale, draw.normal(b, n, _H, _R) * q_scale
        attrs = {"scale": 0.1352337788608801, "kv_format": "f32"}
        result.append(Case("MlaAttention", name, (q_latent, q_pe, cache, table, at), attrs))

    add("one-token", [[39]])
    add("first-token", [[0]])
    add("ragged", [[0, 1, 2, 3, 4], [145, 146, 147, -1, -1], [-1, -1, -1, -1, -1]])
    add("three-single-tokens", [[0], [63], [64]])
    add("nothing-but-padding", [[-1, -1]])
    add("around-a-block", [[62, 63, 64, 65]])
    add("peaked-softmax", [[128, 129]], q_scale=40.0)
    add("flat-softmax", [[128, 129]], q_scale=1e-6)
    return result
