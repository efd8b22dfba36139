"""The reference of `MoeExperts` against one loop over tokens and their experts in f64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from seekforge.plugins.moe_experts.reference import swiglu
from seekforge.plugins.quant import dequantize_weight, fake_quantize
from seekforge.plugins.testing import Case, cases, max_error

CASES = cases("MoeExperts")


def naive(case: Case) -> Tensor:
    x, ids, weights, w13, w13_scale, w2, w2_scale = case.inputs
    quant = fake_quantize if case.attrs["act_quant"] == "ue8m0" else (lambda t: t)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert < 0:  # of another rank
                continue
            up = dequantize_weight(w13[expert], w13_scale[expert]).double()
            gate, value = (up @ quant(x[token]).double()).chunk(2)
            hidden = quant((gate / (1 + torch.exp(-gate)) * value).float()).double()
            y[token] += weight * (dequantize_weight(w2[expert], w2_scale[expert]).double() @ hidden)
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_weighted_sum_of_swiglu_experts(case: Case) -> None:
    want = naive(case)
    assert max_error(case.expected()[0], want) < 5e-6


@pytest.mark.parametrize("bent", ["expert_weights", "w13_scale", "w2_scale"])
def test_an_input_bent_by_one_percent_is_noticed(bent: str) -> None:
    case = next(c for c in CASES if c.name == "random-none")
    at = [arg.name for arg in case.spec.inputs].index(bent)
    inputs = list(case.inputs)
    inputs[at] = inputs[at] * 1.01
    assert max_error(dataclasses.replace(case, inputs=tuple(inputs)).expected()[0], case.expected()[0]) > 1e-3


def test_an_experts_output_is_rounded_before_it_is_weighted() -> None:
    case = next(c for c in CASES if c.name == "one-token-none")
    x, ids, weights, *rest = case.inputs
    x = x.bfloat16()
    one = [Case(case.op, "", (x, ids[:, i : i + 1], torch.ones(1, 1), *rest), case.attrs).expected()[0] for i in (0, 1)]
    assert all(torch.equal(part, part.bfloat16().float()) for part in one)
    both = Case(case.op, "", (x, ids, weights, *rest), case.attrs).expected()[0]
    assert max_error(both, one[0] * weights[0, 0] + one[1] * weights[0, 1]) < 1e-6


def test_swiglu_takes_gate_rows_first() -> None:
    assert swiglu(torch.tensor([[0.0, 100.0, 3.0, 5.0]])).tolist() == [[0.0, 500.0]]
