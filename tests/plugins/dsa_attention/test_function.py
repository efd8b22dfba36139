"""Bodies of `DsaAttention` in ONNX Runtime against the reference."""

import pytest

from seekforge.plugins.specialisation import Specialisation
from seekforge.plugins.testing import Case, cases, max_error, run_function

#: f32 softmax and sums in another order; a scale bent by 1 % moves the result by 1e-3 and more.
TOLERANCE = 3e-6

HOWS = [Specialisation("f32", "float8", kv, bodies) for kv in ("f32", "bf16") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.kv_format}")
@pytest.mark.parametrize("case", cases("DsaAttention"), ids=str)
def test_body_computes_the_reference(case: Case, how: Specialisation) -> None:
    typed = case.typed(how)
    (out,), (expected,) = run_function(case.op, typed.inputs, typed.attrs, how), typed.expected()
    assert expected.isfinite().all()
    assert max_error(out, expected) < TOLERANCE
