"""The norm's kernel under Triton's interpreter, against the reference; codes are those of what it gave."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gpu.judge import judge
from tests.support.kernel_cases import gpu_cases
from torch import Tensor

from seekforge.plugins.add_rms_norm_quantize.reference import add_rms_norm_quantize
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.testing import Case, Draw, equal_bits

ATTRS = {"epsilon": 1e-6}


def right(case: Case, got: Sequence[Tensor]) -> bool:
    return judge(case, got, case.expected())[0]


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("case", gpu_cases("AddRmsNormQuantize"), ids=str)
def test_equals_the_reference(case: Case, sm: int) -> None:
    got = interpret(case.op, case.inputs, case.attrs, sm=sm)
    assert right(case, got)
    if got[1].any():
        bent = list(case.inputs)
        bent[1] = bent[1] * 1.01
        assert not right(case, interpret(case.op, bent, case.attrs, sm=sm))


@pytest.mark.parametrize("index", range(4))
def test_each_result_is_judged(index: int) -> None:
    case = next(one for one in gpu_cases("AddRmsNormQuantize") if one.name == "residual")
    got = list(interpret(case.op, case.inputs, case.attrs, sm=90))
    got[index] = got[index] + 1 if got[index].dtype == torch.int32 else got[index] * 1.01
    assert not right(case, got)


def test_the_norm_sees_the_unrounded_sum() -> None:
    x, residual = torch.full((1, 128), 256.0).bfloat16(), torch.full((1, 128), 0.5).bfloat16()
    x[0, 0] = residual[0, 0] = 0.0
    total, y, _, _ = interpret("AddRmsNormQuantize", (x, torch.ones(128), residual), ATTRS, sm=90)
    assert total[0, 1] == 256.0, "bf16 has no 256.5"
    assert equal_bits(y, add_rms_norm_quantize(x, torch.ones(128), 1e-6, residual=residual)[1])


def test_nan_and_infinite_rows_stay_visible_and_alone() -> None:
    x = Draw(5).normal(4, 256).bfloat16()
    x[1, 3], x[2, 200] = torch.nan, torch.inf
    total, y, codes, _ = interpret("AddRmsNormQuantize", (x, torch.ones(256)), ATTRS, sm=90)
    assert y[1].isnan().all() and y[2].isnan().any() and total[1, 3].isnan()
    assert (codes[1] == 0x7F7F7F7F).all()
    alone = interpret("AddRmsNormQuantize", (x[[0, 3]], torch.ones(256)), ATTRS, sm=90)
    assert all(equal_bits(a[[0, 3]], b) for a, b in zip((total, y, codes), alone[:3], strict=True))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 20), adds=st.booleans(), sm=st.sampled_from([80, 90, 120]))
def test_any_shape(rows: int, blocks: int, adds: bool, sm: int) -> None:
    draw = Draw(rows * blocks)
    x, residual = draw.normal(rows, 128 * blocks).bfloat16(), draw.normal(rows, 128 * blocks).bfloat16()
    inputs = (x, draw.normal(128 * blocks), *((residual,) if adds else ()))
    case = Case("AddRmsNormQuantize", "random", inputs, ATTRS)
    assert right(case, interpret(case.op, inputs, ATTRS, sm=sm))
