"""The body of `MoeRoute` in ONNX Runtime against the reference: the same experts in the same order."""

import pytest
import torch

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, cases, max_error, run_function

#: One exponential and a quotient in f32.
TOLERANCE = 2e-6

HOWS = [Specialization("f32", "float8", "f32", bodies) for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.bodies)
@pytest.mark.parametrize("case", cases("MoeRoute"), ids=str)
def test_body_routes_like_the_reference(case: Case, how: Specialization) -> None:
    (ids, weights), (want_ids, want_weights) = run_function(case.op, case.inputs, case.attrs, how), case.expected()
    assert torch.equal(ids, want_ids)
    assert max_error(weights, want_weights) < TOLERANCE
    assert max_error(weights * 1.01, want_weights) > TOLERANCE
    # relative, too: a weight far below the others counts
    assert ((weights - want_weights).abs() <= 2e-6 * want_weights.abs()).all()
