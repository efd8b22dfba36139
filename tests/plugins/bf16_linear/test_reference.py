"""The reference of `Bf16Linear` against a sum of products in f64."""

import pytest
import torch

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import Case, cases, max_error


@pytest.mark.parametrize("activations", ["f32", "bf16"])
@pytest.mark.parametrize("case", cases("Bf16Linear"), ids=str)
def test_reference_is_the_sum_of_products(case: Case, activations: str) -> None:
    typed = case.typed(Specialization(activations, "float8", "bf16", "trt"))  # pyright: ignore[reportArgumentType]
    x, weight = (one.double() for one in typed.inputs)
    want = (x.unsqueeze(-2) * weight).sum(-1)
    (got,) = typed.expected()
    assert got.dtype == torch.float32 and max_error(got, want.float()) < 2e-6
