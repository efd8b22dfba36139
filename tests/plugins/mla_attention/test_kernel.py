"""Dense attention under Triton's interpreter, against the reference, with the sparse kernel's tolerances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import close, gpu_cases
from torch import Tensor

from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.mla_attention import launch
from seekforge.plugins.mla_attention.reference import mla_attention
from seekforge.plugins.testing import Case, Draw, equal_bits

SCALE = 0.1352337788608801


def run(case: Case, *, sm: int = 90) -> Tensor:
    return interpret(case.op, case.inputs, case.attrs, sm=sm)[0]


@pytest.mark.parametrize("sm", [90, 120])  # tiles of 32 and of 16 positions
@pytest.mark.parametrize("case", gpu_cases("MlaAttention"), ids=str)
def test_equals_the_reference(case: Case, sm: int) -> None:
    """Every slot that no query sees holds NaN."""
    expected = case.expected()[0]
    assert expected.isfinite().all()
    assert close(run(case, sm=sm), expected)


@pytest.mark.parametrize("index", [0, 1])
def test_a_bent_query_is_noticed(index: int) -> None:
    """1 % of the queries, with softmaxes far from flat."""
    case = next(c for c in gpu_cases("MlaAttention") if c.name == "one-token")
    inputs = list(case.inputs)
    inputs[0], inputs[1] = (inputs[0].float() * 3).bfloat16(), (inputs[1].float() * 3).bfloat16()
    got = interpret(case.op, inputs, case.attrs, sm=90)[0]
    assert close(got, mla_attention(*inputs, **case.attrs))  # pyright: ignore[reportArgumentType]
    inputs[index] = (inputs[index].float() * 1.02).bfloat16()
    assert not close(got, mla_attention(*inputs, **case.attrs))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["peaked-softmax", "ragged"])
def test_a_result_bent_by_one_percent_is_noticed(name: str) -> None:
    case = next(c for c in gpu_cases("MlaAttention") if c.name == name)
    got, want = run(case), case.expected()[0]
    assert close(got, want) and not close(got, want.float() * 1.01)


def random_case(positions: list[list[int]], *, heads: int = 4, c: int = 128, r: int = 64, seed: int = 0) -> Case:
    """Random queries at `positions` [B][Q]; shuffled blocks, NaN in every slot that no query sees."""
    draw, at = Draw(seed), torch.tensor(positions)
    b, q = at.shape
    blocks = max(1, int(at.max()) // 64 + 1)
    table = draw.block_table(b, blocks, b * blocks + 2)
    cache = torch.full(((b * blocks + 2) * 64, c + r), torch.nan)
    for i in range(b):
        seen = torch.arange(int(at[i].max()) + 1)
        cache[table[i].long()[seen // 64] * 64 + seen % 64] = draw.normal(len(seen), c + r)
    queries = draw.normal(b, q, heads, c).bfloat16(), draw.normal(b, q, heads, r).bfloat16()
    attrs = {"scale": SCALE, "kv_format": "bf16"}
    return Case("MlaAttention", "random", (*queries, cache.bfloat16(), table, at), attrs)


@pytest.mark.parametrize("splits", [1, 2, 3, 8, 17, 33])
def test_splits_agree(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have no position of a short row, and 17 and 33 are combined in more than one go."""
    case = random_case([[299, 40], [-1, 0]], seed=splits)
    monkeypatch.setattr(launch, "choose_splits", lambda rows, num_blocks, block_n: splits)
    monkeypatch.setattr(launch, "workspace_bytes", lambda bound, sm: 1 << 30)
    assert close(run(case), case.expected()[0])


@pytest.mark.parametrize("heads", [1, 16, 17, 70])
def test_head_counts_around_a_tile(heads: int) -> None:
    case = random_case([[70, 71]], heads=heads, seed=heads)
    assert close(run(case), case.expected()[0])


@pytest.mark.parametrize(("c", "r"), [(512, 64), (256, 16), (128, 32)])
def test_widths(c: int, r: int) -> None:
    case = random_case([[80]], heads=8, c=c, r=r, seed=9)
    assert close(run(case), case.expected()[0])


def test_a_captured_plan_serves_every_length() -> None:
    """Launches are the same wherever the tokens stand: only what lies in `positions` differs."""
    far = random_case([[255], [130]], seed=1)
    q, q_pe, cache, table = far.inputs[:4]
    shapes = [tuple(t.shape) for t in far.inputs]
    plans = set()
    for positions in ([[255], [130]], [[3], [-1]], [[64], [0]]):
        at = torch.tensor(positions)
        plans.add(str(launch.plan(far.spec.bind(shapes, far.attrs), 90)))
        got = interpret("MlaAttention", (q, q_pe, cache, table, at), far.attrs, sm=90)[0]
        assert close(got, mla_attention(q, q_pe, cache, table, at, SCALE, "bf16"))
    assert len(plans) == 1


def test_what_lies_behind_a_tokens_position_never_enters() -> None:
    """The next query's key is cached already: NaN there reaches the next query alone."""
    case = random_case([[65, 66, 67]], seed=2)
    cache, table = case.inputs[2:4]
    cache[int(table[0, 1]) * 64 + 66 % 64, 3] = torch.nan
    got = run(case)
    assert got[0, 0].isfinite().all() and got[0, 1].isnan().any() and got[0, 2].isnan().any()


def test_blocks_outside_the_pool_are_no_keys() -> None:
    case = random_case([[130, 131]], seed=3)
    q, q_pe, cache, table, at = case.inputs
    table[0, 1] = 2**31 - 1
    table[0, 2] = -3
    got = run(case)
    first = torch.full_like(at, 63)
    assert close(got, mla_attention(q, q_pe, cache, table[:, :1], first, SCALE, "bf16"))
    table[:] = torch.tensor([[-1, 10**6, 5]])
    assert (run(case) == 0).all()


@pytest.mark.parametrize("position", [192, 10**6, 2**62])
def test_a_position_behind_the_table_sees_what_the_table_has(position: int) -> None:
    case = random_case([[191]], seed=4)
    want = case.expected()[0]
    case.inputs[4].fill_(position)
    assert close(run(case), want)


@pytest.mark.parametrize("position", [-1, -2, -(2**31), -(2**63)])
def test_a_negative_position_sees_no_key(position: int) -> None:
    case = random_case([[100]], seed=5)
    case.inputs[4].fill_(position)
    assert (run(case) == 0).all()


def test_rows_do_not_depend_on_their_neighbors() -> None:
    case = random_case([[70], [3], [140]], seed=8)
    got = run(case)
    assert equal_bits(run(case), got)
    q, q_pe, cache, table, at = case.inputs
    order = [2, 0, 1]
    again = interpret(case.op, (q[order], q_pe[order], cache, table[order], at[order]), case.attrs, sm=90)[0]
    assert equal_bits(again, got[order])


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 190), min_size=2, max_size=2), min_size=1, max_size=3),
    st.sampled_from([90, 120]),
    st.integers(0, 99),
)
def test_any_positions(positions: list[list[int]], sm: int, seed: int) -> None:
    case = random_case(positions, seed=seed)
    assert close(run(case, sm=sm), case.expected()[0])
