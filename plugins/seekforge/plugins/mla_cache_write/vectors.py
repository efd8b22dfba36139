"""Test vectors of `MlaCacheWrite`. Rows of block 0 (the first 64 slots) are scrap and not compared."""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.plugins.testing import Case, Draw

_C, _R = 128, 64


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(12)
    result: list[Case] = []

    def add(name: str, slots: Tensor, *, c: Tensor | None = None, fp8: bool = True) -> None:
        b, q = slots.shape
        c = draw.normal(b, q, _C) if c is None else c
        inputs = (draw.normal(5 * 64, _C + _R), c, draw.normal(b, q, _R) * 3, slots)
        attrs = {"kv_format": "f32", "kv_fp8": fp8}
        result.append(Case("MlaCacheWrite", f"{name}-{'fp8' if fp8 else 'plain'}", inputs, attrs))

    scattered = (draw.order(4 * 64)[:15] + 64).reshape(3, 5)
    for fp8 in (True, False):
        add("one-token", torch.tensor([[200]]), fp8=fp8)
        add("scattered", scattered, fp8=fp8)
    ragged = scattered.clone()
    ragged[0, 1:], ragged[2] = -1, -1
    add("padded-rows", ragged)
    add("nothing-but-padding", torch.full((2, 3), -1))
    add("last-slot-and-first-of-a-block", torch.tensor([[319, 64, 127, 128]]))
    magnitudes = torch.tensor([0.0, 1e-6, 1e-4, 448.0, 449.0, 3e4]).reshape(1, 6, 1)
    unit = draw.uniform(1, 6, _C, low=-1.0)
    add("latent-maxima", torch.arange(64, 70).reshape(1, 6), c=unit / unit.abs().amax(-1, keepdim=True) * magnitudes)
    return result
