"""`SumRanks` alone is the identity, in torch and in ONNX Runtime; the sum is proven by merging ranks."""

import pytest
import torch

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, cases, equal_bits, run_function


@pytest.mark.parametrize("bodies", ["ort", "trt"])
@pytest.mark.parametrize("case", cases("SumRanks"), ids=str)
def test_one_rank_gives_its_own_part(case: Case, bodies: str) -> None:
    how = Specialization("f32", "float8", "f32", bodies)  # pyright: ignore[reportArgumentType]
    (x,) = case.inputs
    (y,) = run_function(case.op, case.inputs, case.attrs, how)
    (expected,) = case.expected()
    assert equal_bits(y, x) and equal_bits(expected, x)


def test_the_operator_does_not_alias_its_input() -> None:
    x = torch.ones(2, 4)
    assert torch.ops.seekforge.sum_ranks(x, 2).data_ptr() != x.data_ptr()
