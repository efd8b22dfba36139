"""Test vectors of `AddRmsNormQuantize`."""

from __future__ import annotations

import torch

from seekforge.plugins.testing import Case, Draw

_EPSILON = {"epsilon": 1e-6}


def cases() -> list[Case]:
    """Return the vectors without a residual; values are those of bf16, whatever the type."""
    draw = Draw(13)
    result: list[Case] = []

    def add(name: str, rows: tuple[int, ...], width: int, scale: float = 1.0) -> None:
        x = (draw.normal(*rows, width) * scale).bfloat16().float()
        result.append(Case("AddRmsNormQuantize", name, (x, draw.uniform(width, low=0.5, high=1.5)), _EPSILON))

    add("one-token", (1, 1), 128)
    add("three-sequences-of-five", (3, 5), 384)
    add("sixteen-blocks", (2,), 2048)
    add("epsilon-counts", (4,), 256, 1e-3)
    add("large", (2,), 640, 1e4)
    result.append(Case("AddRmsNormQuantize", "zeros", (torch.zeros(2, 256), draw.normal(256)), _EPSILON))
    return result


def optional_cases() -> list[Case]:
    """Return the vectors with a residual."""
    draw = Draw(14)
    result: list[Case] = []
    for name, rows, width in (("residual", (5,), 256), ("residual-of-two-axes", (2, 3), 1536)):
        x, residual = (draw.normal(*rows, width).bfloat16().float() for _ in range(2))
        result.append(Case("AddRmsNormQuantize", name, (x, draw.normal(width), residual * 4), _EPSILON))
    # a sum that bf16 does not hold: the norm sees it unrounded
    x, residual = torch.full((2, 128), 256.0), torch.full((2, 128), 0.5)
    result.append(Case("AddRmsNormQuantize", "unrounded-sum", (x, torch.ones(128), residual), _EPSILON))
    return result
