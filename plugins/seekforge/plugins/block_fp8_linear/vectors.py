"""Test vectors of `BlockFp8Linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.plugins.quant import quantize
from seekforge.plugins.testing import Case, Draw

#: Block maxima on both sides of a change of scale (spec §13.1), at the floor, below it, and huge.
AMAXES = (448.0, 449.0, 447.0, 1.75, 1.0, 2.0, 3.5, 7.0, 100.0, 0.0, 1e-5, 1e-4, 1.1e-4, 3e4, 2.0**-10, 896.0)


def cases() -> list[Case]:
    """Return the vectors."""
    draw = Draw(1)
    result: list[Case] = []

    def add(name: str, x: Tensor, out_features: int, *, quants: tuple[str, ...] = ("ue8m0", "none")) -> None:
        k = x.shape[-1]
        weight, scale = draw.fp8(out_features, k), draw.weight_scale(-(-out_features // 128), -(-k // 128))
        for act_quant in quants:
            result.append(Case("BlockFp8Linear", f"{name}-{act_quant}", (x, weight, scale), {"act_quant": act_quant}))

    add("one-token", draw.normal(1, 1, 128), 128)
    add("three-sequences-of-five", draw.normal(3, 5, 256), 384)
    add("partial-last-block", draw.normal(2, 3, 256), 576)
    add("less-than-one-block-of-rows", draw.normal(7, 384), 64)
    rows = draw.uniform(len(AMAXES), 128, low=-1.0)
    rows = rows / rows.abs().amax(-1, keepdim=True) * torch.tensor(AMAXES).unsqueeze(-1)
    add("block-maxima", torch.cat([rows, draw.normal(len(AMAXES), 128)], dim=-1), 256)
    add("zero-block", torch.cat([torch.zeros(2, 128), draw.normal(2, 128)], dim=-1), 128, quants=("ue8m0",))
    add("ties", rounding_ties(), 128, quants=("ue8m0",))

    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)  # without the two NaN
    weight = every.repeat(130)[: 128 * 256].reshape(128, 256)
    result.append(
        Case(
            "BlockFp8Linear",
            "every-byte",
            (draw.normal(4, 256), weight, draw.weight_scale(1, 2)),
            {"act_quant": "none"},
        )
    )
    return result


def optional_cases() -> list[Case]:
    """Return vectors whose rows are quantized already; what `x` holds besides does not count."""
    draw = Draw(2)
    result: list[Case] = []
    for name, rows, k, out_features in (
        ("codes-of-one-token", (1, 1), 256, 128),
        ("codes-of-four", (4,), 384, 192),
        ("codes-of-many", (3, 7), 256, 320),
    ):
        weight, scale = draw.fp8(out_features, k), draw.weight_scale(-(-out_features // 128), k // 128)
        codes, x_scale = quantize(draw.normal(*rows, k))
        inputs = (torch.full((*rows, k), torch.nan), weight, scale, codes.view(torch.int32), x_scale)
        result.append(Case("BlockFp8Linear", name, inputs, {"act_quant": "ue8m0"}))
    return result


def rounding_ties() -> Tensor:
    """Return [2, 128·n] whose blocks have amax 448 (scale 1) and hold every midpoint between two e4m3 values."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    blocks = torch.nn.functional.pad(middle, (0, -middle.numel() % 127)).reshape(-1, 127)
    blocks = torch.cat([torch.full((blocks.shape[0], 1), 448.0), blocks], dim=-1).reshape(1, -1)
    return torch.cat([blocks, -blocks])
