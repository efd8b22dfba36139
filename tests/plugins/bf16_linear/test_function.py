"""The body of `Bf16Linear` in ONNX Runtime against the reference."""

import pytest

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, cases, max_error, run_function

#: f32 sums of up to 384 products in another order.
TOLERANCE = 2e-6


@pytest.mark.parametrize("bodies", ["ort", "trt"])
@pytest.mark.parametrize("case", cases("Bf16Linear"), ids=str)
def test_body_computes_the_reference(case: Case, bodies: str) -> None:
    how = Specialization("f32", "float8", "f32", bodies)  # pyright: ignore[reportArgumentType]
    typed = case.typed(how)
    (y,), (expected,) = run_function(case.op, typed.inputs, typed.attrs, how), typed.expected()
    assert max_error(y, expected) < TOLERANCE
    assert not expected.any() or max_error(y * 1.01, expected) > TOLERANCE
