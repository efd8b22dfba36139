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

    def add(name: str, slots: Tensor) -> None:
        b, q = slots.shape
        inputs = (draw.normal(5 * 64, _C + _R), draw.normal(b, q, _C), draw.normal(b, q, _R) * 3, slots)
        result.append(Case("MlaCacheWrite", name, inputs, {"kv_format": "f32"}))

    scattered = (draw.order(4 * 64)[:15] + 64).reshape(3, 5)
    add("one-token", torch.tensor([[200]]))
    add("scattered", scattered)
    ragged = scattered.clone()
    ragged[0, 1:], ragged[2] = -1, -1
    add("padded-rows", ragged)
    add("nothing-but-padding", torch.full((2, 3), -1))
    add("last-slot-and-first-of-a-block", torch.tensor([[319, 64, 127, 128]]))
    return result
