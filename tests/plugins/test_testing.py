"""The comparing helpers notice what they should."""

import pytest
import torch

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import (
    calc_diff,
    cases,
    equal_bits,
    max_error,
    one_node_model,
    run_model,
    same_selection,
    to_numpy,
    to_torch,
)


def test_errors_are_relative_to_the_spread() -> None:
    y = torch.tensor([-1.0, 0.0, 3.0])
    assert max_error(y, y) == calc_diff(y, y) == 0
    assert max_error(y + torch.tensor([0, 0.4, 0]), y) == pytest.approx(0.1)
    assert max_error(y * 1.01, y) == pytest.approx(0.03 / 4)
    assert max_error(torch.full((2,), 1.01), torch.ones(2)) == pytest.approx(0.01)
    assert calc_diff(torch.zeros(2), torch.zeros(2)) == 0
    assert calc_diff(y * 1.01, y) == pytest.approx(1 - 2 * 1.01 / (1 + 1.01**2), rel=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_must_be_the_same(bad: float) -> None:
    y = torch.tensor([1.0, bad])
    assert max_error(y, y) == 0
    assert max_error(torch.tensor([1.0, 2.0]), y) == float("inf")
    assert max_error(torch.tensor([1.0, -bad if bad == bad else torch.inf]), y) == float("inf")
    assert max_error(torch.ones(3), torch.ones(2)) == float("inf")


def test_a_selection_may_differ_at_the_boundary_only() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 3.0 - 1e-7, 1.0]])
    want = torch.tensor([[0, 1, 2]])
    assert same_selection(torch.tensor([[2, 0, 1]]), want, scores, 0)
    assert same_selection(torch.tensor([[0, 1, 3]]), want, scores, 1e-6)
    assert not same_selection(torch.tensor([[0, 1, 4]]), want, scores, 1e-6)
    assert not same_selection(torch.tensor([[0, 1, -1]]), want, scores, 1e-6)
    assert not same_selection(torch.tensor([[0, 1, 1]]), want, scores, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64])
def test_tensors_survive_the_way_to_numpy(dtype: torch.dtype) -> None:
    tensor = torch.arange(-3, 5).float().to(dtype)
    assert equal_bits(to_torch(to_numpy(tensor)), tensor)


def test_a_cache_bound_twice_is_updated_in_place() -> None:
    how = Specialization("f32", "float8", "bf16", "ort")
    case = next(c for c in cases("DsaCacheWrite") if c.name == "scattered-fp8").typed(how)
    kinds = ["bf16", "bf16", "f32", "f32", "f32", "i64"]
    types = [(kind, tuple(t.shape)) for kind, t in zip(kinds, case.inputs, strict=True)]
    model = one_node_model(case.op, case.attrs, how, types, types[:2])
    latent, index = (t.clone() for t in case.inputs[:2])
    inputs = dict(zip([a.name for a in case.spec.inputs], (latent, index, *case.inputs[2:]), strict=True))
    run_model(model, inputs, {"latent_cache_out": latent, "index_cache_out": index})
    assert all(equal_bits(got, want) for got, want in zip((latent, index), case.expected(), strict=True))


def test_names_of_vectors_are_unique() -> None:
    names = [str(case) for case in cases()]
    assert len(set(names)) == len(names)
