"""The FP8 linear's kernels under Triton's interpreter, against the reference and the f64 product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import gpu_cases
from torch import Tensor

from seekforge.plugins.block_fp8_linear import launch
from seekforge.plugins.block_fp8_linear.reference import block_fp8_linear
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.linear_tile import Form, Tile
from seekforge.plugins.quant import dequantize_weight, fake_quantize, quantize
from seekforge.plugins.testing import Case, Draw, calc_diff, equal_bits

#: Against the dequantized product, both rounded to bf16 (spec §11.2). A bent scale (1 %) is at 5e-5.
TOLERANCE = 1e-6


def run(x: Tensor, weight: Tensor, scale: Tensor, *, quant: str = "ue8m0", sm: int = 90) -> Tensor:
    return interpret("BlockFp8Linear", (x, weight, scale), {"act_quant": quant}, sm=sm)[0]


def close(actual: Tensor, expected: Tensor) -> bool:
    """Within the tolerance, and no element further than two steps of bf16 of the largest."""
    if not calc_diff(actual.float(), expected.float()) <= TOLERANCE:
        return False
    worst = (actual.float() - expected.float()).abs().max()
    return bool(worst <= 2**-7 * expected.float().abs().max())


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("case", gpu_cases("BlockFp8Linear"), ids=str)
def test_equals_the_reference(case: Case, sm: int) -> None:
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=sm)
    (want,) = case.expected()
    assert close(got, want)
    x, weight, scale, *codes = case.inputs
    (bent,) = replace(case, inputs=(x, weight, scale * 1.01, *codes)).expected()
    assert not close(got, bent)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 33, 70, 130])
def test_rows_that_are_quantized_already_give_the_same_bits(rows: int, sm: int) -> None:
    """And `x` is not read: it holds no numbers here."""
    draw = Draw(rows)
    x, weight, scale = draw.normal(rows, 256).bfloat16(), draw.fp8(192, 256), draw.weight_scale(2, 2)
    codes, x_scale = quantize(x)
    inputs = (torch.full_like(x, torch.nan), weight, scale, codes.view(torch.int32), x_scale)
    (got,) = interpret("BlockFp8Linear", inputs, {"act_quant": "ue8m0"}, sm=sm)
    assert equal_bits(got, run(x, weight, scale, sm=sm))


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 32, 33, 63, 64, 65, 128, 130])
def test_row_counts_around_every_tile(rows: int, sm: int) -> None:
    draw = Draw(rows)
    x, weight, scale = draw.normal(rows, 256).bfloat16(), draw.fp8(192, 256), draw.weight_scale(2, 2)
    got = run(x, weight, scale, sm=sm)
    assert close(got, block_fp8_linear(x, weight, scale, "ue8m0"))
    assert not close(got, block_fp8_linear(x, weight, scale * 1.01, "ue8m0"))


@pytest.mark.parametrize("rows", [2, 5, 40])
@pytest.mark.parametrize("blocks", [1, 3, 4, 5, 9])
def test_blocks_that_are_no_multiple_of_the_parts(rows: int, blocks: int) -> None:
    draw = Draw(blocks)
    x, weight = draw.normal(rows, 128 * blocks).bfloat16(), draw.fp8(40, 128 * blocks)
    scale = draw.weight_scale(1, blocks)
    scale[0, -1] = 1.0  # the last block must count once, whichever part has it
    assert close(run(x, weight, scale), block_fp8_linear(x, weight, scale, "ue8m0"))


def cut(monkeypatch: pytest.MonkeyPatch, form: int, splits: int) -> None:
    """Cut products as the form of this place among those of a call, or the last, and into so many splits."""

    def choose(forms: tuple[Form, ...], *_: int, **__: bool) -> Tile:
        return replace(forms[min(form, len(forms) - 1)].tile, splits=splits)

    monkeypatch.setattr(launch, "choose", choose)


@pytest.mark.parametrize("rows", [65, 128, 130])
@pytest.mark.parametrize("columns", [64, 100, 300])
@pytest.mark.parametrize(("sm", "form", "splits"), [(90, 0, 1), (90, 0, 3), (90, 1, 2), (100, 0, 2), (80, 0, 2)])
def test_every_large_tile_at_its_borders(
    rows: int, columns: int, sm: int, form: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Draw(rows + columns)
    x, weight = draw.normal(rows, 384).bfloat16(), draw.fp8(columns, 384)
    scale = draw.weight_scale(-(-columns // 128), 3)
    cut(monkeypatch, form, splits)
    got = run(x, weight, scale, sm=sm)
    assert close(got, block_fp8_linear(x, weight, scale, "ue8m0"))
    assert not close(got, block_fp8_linear(x, weight, scale * 1.01, "ue8m0"))


@pytest.mark.parametrize("rows", [35, 70])
@pytest.mark.parametrize("splits", [1, 2, 3, 8, 16])
def test_splits_agree_within_a_step_of_bf16(rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(splits)
    x, weight, scale = draw.normal(rows, 2048).bfloat16(), draw.fp8(128, 2048), draw.weight_scale(1, 16)
    cut(monkeypatch, 0, splits)
    got = run(x, weight, scale, sm=100)
    want = (fake_quantize(x).double() @ dequantize_weight(weight, scale).double().T).bfloat16()
    step = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    near_zero = want.float().abs() < 1e-3 * want.float().abs().max()
    assert (step[~near_zero] <= 1).all()


def test_one_huge_scale_among_small_ones() -> None:
    draw = Draw(7)
    x, weight, scale = draw.normal(4, 384).bfloat16(), draw.fp8(256, 384), draw.weight_scale(2, 3)
    scale[1, 1] = 3e4
    got, want = run(x, weight, scale), block_fp8_linear(x, weight, scale, "ue8m0")
    assert close(got[:, :128], want[:, :128]) and close(got[:, 128:], want[:, 128:])


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_int8_typed_bytes_are_the_same_weights(sm: int) -> None:
    draw = Draw(8)
    x, weight, scale = draw.normal(5, 128).bfloat16(), draw.fp8(128, 128), draw.weight_scale(1, 1)
    assert equal_bits(run(x, weight.view(torch.int8), scale, sm=sm), run(x, weight, scale, sm=sm))


def test_rows_do_not_depend_on_their_neighbors() -> None:
    draw = Draw(9)
    x, weight, scale = draw.normal(16, 256).bfloat16(), draw.fp8(128, 256), draw.weight_scale(1, 2)
    all_rows, order = run(x, weight, scale), draw.order(16)
    assert equal_bits(run(x[order], weight, scale), all_rows[order])
    assert equal_bits(run(x[3:4], weight, scale), all_rows[3:4])
    assert equal_bits(run(x, weight, scale), all_rows)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 70),
    n=st.integers(1, 260),
    blocks=st.integers(1, 3),
    quant=st.sampled_from(["ue8m0", "none"]),
    sm=st.sampled_from([80, 90, 120]),
)
def test_any_shape(rows: int, n: int, blocks: int, quant: str, sm: int) -> None:
    draw = Draw(rows * n)
    x, weight = draw.normal(rows, 128 * blocks).bfloat16(), draw.fp8(n, 128 * blocks)
    scale = draw.weight_scale(-(-n // 128), blocks)
    assert close(run(x, weight, scale, quant=quant, sm=sm), block_fp8_linear(x, weight, scale, quant))


def test_the_quantizer_is_exact_to_the_bit() -> None:
    """Through an identity weight: every value of the quantized rows comes out as it is."""
    case = next(c for c in gpu_cases("BlockFp8Linear") if c.name == "ties-ue8m0")
    x = case.inputs[0]
    eye = torch.eye(128).repeat(1, x.shape[-1] // 128)
    for block in range(x.shape[-1] // 128):
        scale = torch.zeros(1, x.shape[-1] // 128)
        scale[0, block] = 1.0
        got = run(x, eye.to(torch.float8_e4m3fn), scale)
        assert torch.equal(got, fake_quantize(x)[:, block * 128 : block * 128 + 128])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(576, 7168), (7168, 2048), (2112, 7168)])
def test_real_widths(n: int, k: int) -> None:
    draw = Draw(10)
    x, weight, scale = draw.normal(17, k).bfloat16(), draw.fp8(n, k), draw.weight_scale(-(-n // 128), k // 128)
    assert close(run(x, weight, scale), block_fp8_linear(x, weight, scale, "ue8m0"))
