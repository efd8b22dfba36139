"""Test vectors of `Bf16Linear`."""

from __future__ import annotations

import torch

from seekforge.plugins.testing import Case, Draw


def cases() -> list[Case]:
    """Return the vectors; values are those of bf16, whatever the type."""
    draw = Draw(11)
    result: list[Case] = []

    def add(name: str, rows: tuple[int, ...], n: int, k: int) -> None:
        x, weight = draw.normal(*rows, k).bfloat16().float(), draw.normal(n, k).bfloat16().float()
        result.append(Case("Bf16Linear", name, (x, weight), {}))

    add("one-token", (1, 1), 128, 128)
    add("three-sequences-of-five", (3, 5), 384, 256)
    add("fewer-out-features-than-a-tile", (2, 3), 8, 256)
    add("partial-last-tile", (7,), 131, 384)
    add("many-rows", (70,), 192, 128)
    # sums that bf16 cannot hold: 256 + 2^-8, and large terms that cancel
    x = torch.ones(2, 128)
    x[1, 64:] = -1.0
    weight = torch.full((16, 128), 256.0)
    weight[:, 0] += 2.0
    weight[:, 127] = 2.0**-8
    result.append(Case("Bf16Linear", "sums-beyond-bf16", (x, weight), {}))
    result.append(Case("Bf16Linear", "zeros", (torch.zeros(3, 128), draw.normal(5, 128).bfloat16().float()), {}))
    return result
