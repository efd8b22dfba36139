"""Bodies of `MlaAttention` in ONNX Runtime against the reference."""

import pytest

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, cases, max_error, run_function

HOWS = [Specialization("f32", "float8", kv, bodies) for kv in ("f32", "bf16") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.kv_format}")
@pytest.mark.parametrize("case", cases("MlaAttention"), ids=str)
def test_body_attends_as_the_reference(case: Case, how: Specialization) -> None:
    typed = case.typed(how)
    (got,) = run_function(case.op, typed.inputs, typed.attrs, how)
    assert max_error(got, typed.expected()[0]) < 1e-5
