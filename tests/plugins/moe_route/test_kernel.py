"""The router kernel under Triton's interpreter: the same experts in the same order, and the same weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.moe_route.reference import moe_route
from seekforge.plugins.testing import Case, cases

#: One exponential, a sum of at most 16 terms and a quotient in f32, relative.
TOLERANCE = 1e-6
ATTRS = {"n_group": 4, "topk_group": 2, "top_k": 4, "norm": True, "scale": 2.5}

# the interpreter's exponential is NumPy's, which says so when it overflows
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def run(logits: Tensor, bias: Tensor, **changed: object) -> tuple[Tensor, Tensor]:
    ids, weights = interpret("MoeRoute", (logits, bias), ATTRS | changed, sm=90)
    return ids, weights


def matches(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return torch.equal(got[0], want[0]) and bool(((got[1] - want[1]).abs() <= TOLERANCE * want[1].abs()).all())


@pytest.mark.parametrize("case", cases("MoeRoute"), ids=str)
def test_routes_like_the_reference(case: Case) -> None:
    got, want = interpret(case.op, case.inputs, case.attrs, sm=90), case.expected()
    if case.name == "saturated":  # exp overflows: both give 0 or 1, and a quotient of denormals is less exact
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=1e-30)
        return
    assert matches(got, want)
    assert not matches((got[0], got[1] * 1.01), want)


def test_bent_inputs_are_noticed() -> None:
    case = next(c for c in cases("MoeRoute") if c.name == "as-large-as-v3.2")
    got = interpret(case.op, case.inputs, case.attrs, sm=90)
    logits, bias = case.inputs
    assert not matches(got, moe_route(logits * 1.01, bias, **case.attrs))
    assert not matches(got, moe_route(logits, bias * 1.5, **case.attrs))


@pytest.mark.parametrize("value", [88.0, -88.0, torch.inf, -torch.inf, torch.nan])
def test_extreme_rows_give_different_valid_experts(value: float) -> None:
    logits = torch.full((3, 16), value)
    logits[1, ::2] = 0.0
    logits[2, 5:] = torch.nan
    ids, _ = run(logits, torch.zeros(16))
    for row in ids.tolist():
        assert len(set(row)) == 4 and all(0 <= expert < 16 for expert in row)


def test_nan_loses_against_every_number() -> None:
    logits = torch.full((1, 16), torch.nan)
    logits[0, [3, 9]] = torch.tensor([-80.0, 2.0])
    ids, weights = run(logits, torch.zeros(16), n_group=1, topk_group=1)
    assert ids[0, :2].tolist() == [9, 3]
    assert weights[0].isnan().any(), "a picked NaN stays visible"


def test_a_bias_far_below_the_scores() -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.full((16,), -1e4)
    bias[3] = 0.0
    ids, weights = run(logits, bias)
    assert (ids[:, 0] == 3).all()
    assert torch.isfinite(weights).all()


def test_rows_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, bias = torch.randn(9, 32, generator=generator), torch.randn(32, generator=generator) * 0.1
    ids, weights = run(logits, bias)
    order = torch.randperm(9, generator=generator)
    again = run(logits[order], bias)
    assert torch.equal(again[0], ids[order]) and torch.equal(again[1], weights[order])
    alone = run(logits[4:5], bias)
    assert torch.equal(alone[0], ids[4:5]) and torch.equal(alone[1], weights[4:5])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    experts = data.draw(st.sampled_from([16, 32, 64]))
    groups = data.draw(st.sampled_from([g for g in (1, 2, 4, 8, 16) if g <= experts // 2]))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(16, kept * experts // groups)))
    tokens = data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # thousandths: far apart where they differ, often equal
    logits = torch.randint(-3000, 3000, (tokens, experts), generator=generator) / 1000
    attrs = ATTRS | {"n_group": groups, "topk_group": kept, "top_k": top_k, "norm": data.draw(st.booleans())}
    got = interpret("MoeRoute", (logits, torch.zeros(experts)), attrs, sm=90)
    want = moe_route(logits, torch.zeros(experts), **attrs)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(got[1], want[1], rtol=1e-5)
    if groups == kept:  # the sum of two sigmoids may tie by rounding, and groups of a tie are as good as each other
        assert torch.equal(got[0], want[0])
