"""The body of `AddRmsNormQuantize` in ONNX Runtime against the reference: bytes by arithmetic, too."""

from __future__ import annotations

import pytest
import torch

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.quant import quantize
from seekforge.plugins.testing import Case, Draw, cases, equal_bits, max_error, run_function


@pytest.mark.parametrize("bodies", ["ort", "trt"])
@pytest.mark.parametrize("case", cases("AddRmsNormQuantize"), ids=str)
def test_body_computes_the_reference(case: Case, bodies: str) -> None:
    how = Specialization("f32", "float8", "f32", bodies)  # pyright: ignore[reportArgumentType]
    typed = case.typed(how)
    total, y, codes, scale = run_function(case.op, typed.inputs, typed.attrs, how)
    expected = typed.expected()
    assert equal_bits(total, expected[0]) and max_error(y, expected[1]) < 1e-6
    assert not expected[1].any() or max_error(y * 1.01, expected[1]) > 1e-6
    _same_codes(y, codes, scale)


def test_every_rounding_of_a_byte() -> None:
    """Values of a norm with weight 1 over their own rms: all magnitudes that a block can have, and those between."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([grid, middle, -grid[1:], -middle])
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 127)).reshape(-1, 127)
    x = torch.cat([torch.full((blocks.shape[0], 1), 448.0), blocks], dim=-1)
    x[-1] = Draw(0).normal(128) * 1e-5
    how = Specialization("f32", "float8", "f32", "ort")
    rms = float((x.double().square().mean(-1)).sqrt()[0])
    _, y, codes, scale = run_function("AddRmsNormQuantize", (x, torch.full((128,), rms)), {"epsilon": 0.0}, how)
    _same_codes(y, codes, scale)


def _same_codes(y: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    wanted, scales = quantize(y)
    assert equal_bits(scale, scales)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), wanted.float())
