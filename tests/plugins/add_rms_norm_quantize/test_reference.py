"""The reference of `AddRmsNormQuantize` against the formulas in f64, and against what a program has in its place."""

from __future__ import annotations

import pytest
import torch

from seekforge.exporter.models.shared.layers import RmsNorm
from seekforge.plugins.add_rms_norm_quantize.reference import add_rms_norm_quantize
from seekforge.plugins.quant import quantize
from seekforge.plugins.testing import Case, Draw, equal_bits, kernel_cases, max_error


@pytest.mark.parametrize("case", kernel_cases("AddRmsNormQuantize"), ids=str)
def test_reference_is_the_formula(case: Case) -> None:
    x, weight, *residual = (one.double() for one in case.inputs)
    wide = x + residual[0] if residual else x
    want = wide / (wide.square().mean(-1, keepdim=True) + case.attrs["epsilon"]).sqrt() * weight
    total, y, codes, scale = case.expected()
    assert max_error(total, wide.float()) == 0 and max_error(y, want.float()) < 1e-6
    values = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)
    assert max_error(values.flatten(-2), y) < 1 / 15, "four bits of a mantissa"


def test_it_is_the_models_norm_and_the_linears_quantizer() -> None:
    draw, norm = Draw(3), RmsNorm(256, 1e-6, torch.bfloat16)
    norm.weight.data = draw.normal(256).bfloat16()
    x, residual = draw.normal(4, 256).bfloat16(), draw.normal(4, 256).bfloat16()
    y, total = norm.add(x, residual)
    got = add_rms_norm_quantize(x, norm.weight.float(), 1e-6, residual=residual)
    codes, scale = quantize(y)
    wanted = (total, y, codes.view(torch.int32), scale)
    assert all(equal_bits(a, b) for a, b in zip(got, wanted, strict=True))
    alone = add_rms_norm_quantize(x, norm.weight.float(), 1e-6)
    assert equal_bits(alone[1], norm(x)) and equal_bits(alone[0], x)
