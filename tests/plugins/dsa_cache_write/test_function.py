"""Bodies of `DsaCacheWrite` in ONNX Runtime against the reference, byte for byte outside block 0."""

import pytest

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import SCRAP, Case, cases, equal_bits, run_function

HOWS = [Specialization("f32", "float8", kv, bodies) for kv in ("f32", "bf16") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.kv_format}")
@pytest.mark.parametrize("case", cases("DsaCacheWrite"), ids=str)
def test_body_writes_the_bytes_of_the_reference(case: Case, how: Specialization) -> None:
    typed = case.typed(how)
    for cache, want in zip(run_function(case.op, typed.inputs, typed.attrs, how), typed.expected(), strict=True):
        assert equal_bits(cache[SCRAP:] + 0.0, want[SCRAP:] + 0.0)  # + 0.0: -0 and 0 are one value here
