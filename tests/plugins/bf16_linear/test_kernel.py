"""Kernels of the bf16 linear under Triton's interpreter, against the reference and the f64 product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import gpu_cases
from torch import Tensor

from seekforge.plugins.bf16_linear import launch
from seekforge.plugins.bf16_linear.reference import bf16_linear
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.testing import Case, Draw, calc_diff, equal_bits

#: f32 sums in another order (by calc_diff). One rounding of a result to bf16 is at 1e-6, a bent weight (1 %) at 5e-5.
TOLERANCE = 1e-10


def run(x: Tensor, weight: Tensor, *, sm: int = 90) -> Tensor:
    return interpret("Bf16Linear", (x, weight), {}, sm=sm)[0]


def close(actual: Tensor, expected: Tensor) -> bool:
    return calc_diff(actual, expected) <= TOLERANCE


def drawn(rows: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    draw = Draw(rows * n + k)
    return draw.normal(rows, k).bfloat16(), draw.normal(n, k).bfloat16()


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("case", gpu_cases("Bf16Linear"), ids=str)
def test_equals_the_reference(case: Case, sm: int) -> None:
    (got,) = interpret(case.op, case.inputs, case.attrs, sm=sm)
    (want,) = case.expected()
    assert got.dtype == torch.float32 and close(got, want)
    if want.any():
        assert not close(got, want * 1.01) and not close(got, want.bfloat16().float())


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("rows", [1, 4, 5, 15, 16, 17, 32, 33, 63, 64, 65, 128, 130])
def test_row_counts_around_every_tile(rows: int, sm: int) -> None:
    x, weight = drawn(rows, 192, 320)
    assert close(run(x, weight, sm=sm), bf16_linear(x, weight))


@pytest.mark.parametrize("rows", [19, 70])
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16])
def test_any_number_of_splits_gives_the_f64_product(rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(rows, 40, 1024)
    monkeypatch.setattr(launch, "choose", lambda forms, *_, **__: replace(forms[0].tile, splits=splits))
    assert close(run(x, weight), x.double() @ weight.double().T)


def test_sums_hold_what_bf16_cannot() -> None:
    x, weight = torch.ones(1, 128).bfloat16(), torch.ones(1, 128).bfloat16()
    weight[0, 0] = 2.0**-15
    assert run(x, weight).item() == 127.0 + 2.0**-15


def test_rows_do_not_depend_on_their_neighbors() -> None:
    x, weight = drawn(16, 128, 256)
    all_rows, order = run(x, weight), Draw(9).order(16)
    assert equal_bits(run(x[order], weight), all_rows[order])
    assert equal_bits(run(x[3:9], weight), all_rows[3:9])
    assert equal_bits(run(x[3:4], weight), run(x[2:6], weight)[1:2])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 140),
    n=st.integers(1, 260),
    blocks=st.integers(1, 6),
    sm=st.sampled_from([80, 90, 120]),
)
def test_any_shape(rows: int, n: int, blocks: int, sm: int) -> None:
    x, weight = drawn(rows, n, 64 * blocks)
    assert close(run(x, weight, sm=sm), bf16_linear(x, weight))
