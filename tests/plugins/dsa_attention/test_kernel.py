"""Sparse attention under Triton's interpreter, against the reference, with FlashMLA's tolerances (spec §11)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import ATTRS, close, gpu_cases, packed_latents
from torch import Tensor

from seekforge.plugins.dsa_attention import kernel, launch
from seekforge.plugins.dsa_attention.reference import dsa_attention
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.latent_tile import LOG2_E
from seekforge.plugins.quant import fake_quantize, unpack_latent
from seekforge.plugins.testing import Case, Draw, equal_bits

SCALE = 0.1352337788608801


def run(case: Case, *, sm: int = 90) -> Tensor:
    return interpret(case.op, case.inputs, case.attrs, sm=sm)[0]


def with_format(case: Case, kv_format: str) -> Case:
    found = ATTRS["DsaAttention"](case, kv_format)
    assert found is not None
    return found


@pytest.mark.parametrize(("kv_format", "sm"), [("fp8_ds", 90), ("fp8_ds", 80), ("bf16", 90)])
@pytest.mark.parametrize("case", gpu_cases("DsaAttention"), ids=str)
def test_equals_the_reference(case: Case, kv_format: str, sm: int) -> None:
    case = with_format(case, kv_format)
    assert close(run(case, sm=sm), case.expected()[0])


@pytest.mark.parametrize("index", [0, 1])
def test_a_bent_query_is_noticed(index: int) -> None:
    """1 % of the queries, with softmaxes far from flat."""
    case = with_format(next(c for c in gpu_cases("DsaAttention") if c.name == "one-token"), "fp8_ds")
    inputs = list(case.inputs)
    inputs[0], inputs[1] = (inputs[0].float() * 3).bfloat16(), (inputs[1].float() * 3).bfloat16()
    got = interpret(case.op, inputs, case.attrs, sm=90)[0]
    assert close(got, dsa_attention(*inputs, **case.attrs))  # pyright: ignore[reportArgumentType]
    inputs[index] = (inputs[index].float() * 1.02).bfloat16()
    assert not close(got, dsa_attention(*inputs, **case.attrs))  # pyright: ignore[reportArgumentType]


def test_a_bent_scale_and_value_are_noticed() -> None:
    case = with_format(next(c for c in gpu_cases("DsaAttention") if c.name == "peaked-softmax"), "bf16")
    got, want = run(case), case.expected()[0]
    assert not close(got, want.float() * 1.01)


def random_case(
    *, b: int, q: int, heads: int = 4, topk: int = 48, visible: int = 150, c: int = 128, seed: int = 0
) -> Case:
    """Random queries and indices in the whole of a sequence; shuffled blocks, an fp8_ds cache, NaN in other blocks."""
    draw = Draw(seed)
    blocks = -(-visible // 64)
    num_blocks = b * blocks + 2
    table = draw.block_table(b, blocks, num_blocks)
    rows = [fake_quantize(draw.normal(num_blocks * 64, c)), draw.normal(num_blocks * 64, 64)]
    cache = packed_latents(torch.cat(rows, 1).bfloat16(), c)
    used = torch.zeros(num_blocks, dtype=torch.bool)
    used[table.long().flatten()] = True
    cache[~used] = -1
    indices = torch.full((b, q, topk), -1, dtype=torch.int32)
    for i in range(b):
        for j in range(q):
            count = min(visible, int(draw.integers(1, low=0, high=topk + 1)))
            indices[i, j, :count] = draw.order(visible)[:count].sort().values.to(torch.int32)
    inputs = (draw.normal(b, q, heads, c).bfloat16(), draw.normal(b, q, heads, 64).bfloat16(), cache, table, indices)
    return Case("DsaAttention", "random", inputs, {"scale": SCALE, "kv_format": "fp8_ds"})


def cut_into(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every row cut into so many parts, and scratch asked for them."""
    monkeypatch.setattr(launch, "choose_splits", lambda rows, programs, topk, block_n, per_sm: splits)
    monkeypatch.setattr(launch, "_most_parts", launch._most_parts.__wrapped__)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_splits_agree(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(b=2, q=2, topk=270, visible=300, seed=splits)
    cut_into(splits, monkeypatch)
    assert close(run(case), case.expected()[0])


@pytest.mark.parametrize("kv_format", ["fp8_ds", "bf16"])
@pytest.mark.parametrize(
    ("heads", "c", "sm"), [(4, 512, 90), (4, 256, 120), (40, 512, 90), (40, 256, 90), (40, 512, 80)]
)
@pytest.mark.parametrize("splits", [1, 2])
def test_columns_are_shared(
    kv_format: str, heads: int, c: int, sm: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of programs that sum half of the columns, each scale belongs to its own tile: they differ here."""
    cut_into(splits, monkeypatch)
    case = random_case(b=1, q=2, heads=heads, c=c, seed=heads + c)
    q, q_pe, cache, table, indices = case.inputs
    scales = cache.view(torch.uint8)[..., c : c + c // 32].view(torch.float32)
    scales *= torch.tensor([1.0, 3.0, 0.5, 2.0])[: c // 128]
    if kv_format == "bf16":
        cache = torch.cat(unpack_latent(cache.flatten(0, 1), c), 1).bfloat16()
    inputs, attrs = (q, q_pe, cache, table, indices), {"scale": SCALE, "kv_format": kv_format}
    got, want = interpret(case.op, inputs, attrs, sm=sm)[0], dsa_attention(*inputs, SCALE, kv_format)
    assert close(got, want) and not close(got, want.float() * 1.01)


@pytest.mark.parametrize(
    ("splits", "count", "used"),
    [(8, 0, 0), (8, 1, 1), (8, 32, 1), (8, 100, 4), (8, 270, 5), (3, 100, 2), (4, 270, 3), (20, 270, 9)],
)
def test_splits_share_the_keys_that_there_are_and_others_do_nothing(splits: int, count: int, used: int) -> None:
    """The parts of splits without keys are neither written nor read: here they stay NaN."""
    heads, width, topk = 4, 128, 270
    case = random_case(b=1, q=1, heads=heads, topk=topk, visible=300, seed=count)
    q, q_pe, cache, table, indices = case.inputs
    indices[0, 0] = -1
    indices[0, 0, :count] = torch.arange(count)
    variants = launch.variants({"H": heads, "C": width, "R": 64, "kv_format": "fp8_ds"}, 90)
    wanted = "part", f"combine-{next(most for most in (4, 8, 32) if splits <= most)}"
    part, combine = (next(one for one in variants if one.name == name) for name in wanted)
    parts, sums = torch.full((splits, heads, width), torch.nan), torch.full((splits, heads), torch.nan)
    sizes = {"num_slots": cache.shape[0] * 64, "num_blocks": table.shape[1], "TOPK": topk, "first_row": 0}
    sizes |= {"rows_per_sequence": 1, "splits": splits, "scale_log2": SCALE * LOG2_E}
    kernel.attend_kernel[1, 1, splits](
        q, q_pe, cache.view(torch.uint8), table, indices, parts, sums, **sizes, **part.constants
    )
    assert parts.isnan().flatten(1).all(1).tolist() == [False] * used + [True] * (splits - used)
    assert (sums == -torch.inf).all(1).tolist() == [False] * used + [True] * (splits - used)
    out = torch.full((1, 1, heads, width), torch.nan, dtype=torch.bfloat16)
    kernel.combine_kernel[1, heads, 1](parts, sums, out, splits, **combine.constants)
    assert close(out, case.expected()[0])


@pytest.mark.parametrize("place", [0, 15, 16, 37, 39])
def test_a_key_behind_places_without_one_is_found(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row whose places are looked at in several passes."""
    monkeypatch.setattr(launch, "_BLOCK_K", 16)
    case = random_case(b=1, q=2, topk=40, visible=100, seed=place)
    indices = case.inputs[4]
    indices[0, 0] = -1
    indices[0, 0, place] = 77
    got = run(case)
    assert close(got, case.expected()[0]) and (got[0, 0] != 0).any()


@pytest.mark.parametrize("heads", [1, 16, 17, 40])
def test_head_counts_around_a_tile(heads: int) -> None:
    case = random_case(b=1, q=2, heads=heads, seed=heads)
    assert close(run(case), case.expected()[0])


def test_v32_widths() -> None:
    case = random_case(b=1, q=1, heads=8, c=512, topk=64, seed=9)
    assert close(run(case), case.expected()[0])


@pytest.mark.parametrize("sm", [80, 90])
def test_long_prompts_expand_each_sequence_once(sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "EXPAND_ROWS", 3)
    case = random_case(b=2, q=3, topk=40, visible=100, seed=4)
    found = launch.plan(case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs), sm)
    assert [one.variant for one in found.launches] == ["expand", "attend-expanded"] * 2
    assert close(run(case, sm=sm), case.expected()[0])


def test_indices_that_are_no_position_are_no_key() -> None:
    case = random_case(b=1, q=3, topk=16, seed=5)
    q, q_pe, cache, table, indices = case.inputs
    bad = torch.tensor([10**6, 2**31 - 1, -(2**31), 192, -7], dtype=torch.int32)  # the table has 3 blocks of 64
    indices[0, 0, 3:8] = bad
    indices[0, 1] = bad.repeat(4)[:16]
    indices[0, 2] = torch.tensor([-1, 5] * 8)
    clean = torch.where((indices >= 0) & (indices < 192), indices, -1)
    want = dsa_attention(q, q_pe, cache, table, clean, SCALE, "fp8_ds")
    got = run(case)
    assert close(got, want)
    assert (got[0, 1] == 0).all()


def test_block_table_entries_outside_the_pool_are_no_key() -> None:
    case = random_case(b=1, q=1, topk=16, seed=6)
    table = case.inputs[3]
    table[:] = torch.tensor([[-3, 10**6, 2**31 - 1]])
    assert (run(case) == 0).all()


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_of_a_chosen_key_stays_visible(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(splits, monkeypatch)
    case = random_case(b=1, q=2, topk=40, visible=64, seed=7)
    cache, table, indices = case.inputs[2:]
    indices[0, 0], indices[0, 1] = torch.arange(40), torch.arange(8, 48)
    cache[int(table[0, 0]), 3] = -1
    got = run(case)
    assert got[0, 0].isnan().all() and got[0, 1].isfinite().all()


def test_rows_do_not_depend_on_their_neighbors() -> None:
    case = random_case(b=3, q=1, topk=40, seed=8)
    got = run(case)
    assert equal_bits(run(case), got)
    q, q_pe, cache, table, indices = case.inputs
    order = [2, 0, 1]
    again = interpret(case.op, (q[order], q_pe[order], cache, table[order], indices[order]), case.attrs, sm=90)[0]
    assert equal_bits(again, got[order])


@settings(max_examples=10, deadline=None)
@given(
    b=st.integers(1, 3),
    q=st.integers(1, 3),
    topk=st.integers(1, 70),
    visible=st.integers(1, 190),
    sm=st.sampled_from([80, 90, 120]),
    seed=st.integers(0, 99),
)
def test_any_shape(b: int, q: int, topk: int, visible: int, sm: int, seed: int) -> None:
    case = random_case(b=b, q=q, topk=topk, visible=visible, seed=seed)
    assert close(run(case, sm=sm), case.expected()[0])
