"""The experts' kernels under Triton's interpreter, against the reference; the final sum bit for bit."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kernel_cases import gpu_cases
from torch import Tensor

from seekforge.formats.quantization import nvfp4
from seekforge.plugins.kernels.interpreter import interpret
from seekforge.plugins.moe_experts import launch
from seekforge.plugins.moe_experts.kernel import _nvfp4, combine_kernel, count_kernel, place_kernel
from seekforge.plugins.moe_experts.reference import moe_experts
from seekforge.plugins.testing import Case, Draw, calc_diff, equal_bits

#: Against the FP8 reference: products in another order, as for one FP8 linear (spec §11.2).
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@triton.jit
def read_nvfp4(row_ptr, value_ptr):
    """128 rows of 128 NVFP4 values, 72 bytes each -> f32."""
    n = tl.arange(0, 128)
    tl.store(
        value_ptr + n[:, None] * 128 + n[None, :], _nvfp4((row_ptr + n * 72)[None, :], 0, 128, 1, 128).reshape(128, 128)
    )


def run(case: Case, *, sm: int = 90) -> Tensor:
    return interpret(case.op, case.inputs, case.attrs, sm=sm)[0]


#: SM80 differs in how bytes are read, which some cases show.
CASES = [
    pytest.param(case, sm, id=f"{case}-{sm}")
    for case in gpu_cases("MoeExperts")
    for sm in (80, 90)
    if sm == 90 or case.name.startswith(("random", "zero-and-large"))
]


@pytest.fixture(params=["grouped", "narrow"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms, whatever the number of tokens."""
    most = 0 if request.param == "grouped" else 1000
    monkeypatch.setattr(launch, "few_tokens", lambda sm: most)
    return request.param


@pytest.mark.parametrize(("case", "sm"), CASES)
def test_equals_the_reference(case: Case, sm: int, form: str) -> None:
    got, (want,) = run(case, sm=sm), case.expected()
    assert calc_diff(got, want) <= TOLERANCE
    assert calc_diff(got * 1.01, want) > TOLERANCE


@pytest.mark.parametrize(
    ("name", "bent"),
    [
        ("one-token-ue8m0", "expert_weights"),
        ("one-token-ue8m0", "w13_scale"),
        ("one-token-ue8m0", "w2_scale"),
        ("codes", "x_scale"),
        ("narrower-shared", "shared_w13_scale"),
        ("narrower-shared", "shared_w2_scale"),
    ],
)
def test_bent_weights_and_scales_are_noticed(name: str, bent: str, form: str) -> None:
    case = next(c for c in gpu_cases("MoeExperts") if c.name == name)
    inputs = case.spec.named(case.inputs)
    inputs[bent] = inputs[bent] * 1.01
    assert calc_diff(run(case), replace(case, inputs=tuple(inputs.values())).expected()[0]) > TOLERANCE


def test_a_shared_expert_is_a_linear_more_to_the_bit(form: str) -> None:
    """As an engine has it that keeps it apart: its rows in bf16, added in f32 to those of the routed ones."""
    case = next(c for c in gpu_cases("MoeExperts") if c.name == "shared-of-many")
    inputs = case.spec.named(case.inputs)
    routed = run(replace(case, inputs=case.inputs[:9]))
    ids = torch.zeros(len(routed), 1, dtype=torch.int32)
    weights = [inputs[f"shared_{name}"][None] for name in ("w13", "w13_scale", "w2", "w2_scale")]
    alone = (inputs["x"], ids, torch.ones(len(routed), 1), *weights, *case.inputs[7:9])
    assert equal_bits(run(case), routed + run(replace(case, inputs=alone)))


def random_case(tokens: int, top_k: int, *, experts: int = 6, seed: int = 0, hidden: int = 128) -> Case:
    draw = Draw(seed)
    ids = torch.stack([draw.order(experts)[:top_k] for _ in range(tokens)]).int()
    inputs = (
        draw.normal(tokens, hidden).bfloat16(),
        ids,
        draw.uniform(tokens, top_k, low=-0.5, high=1.0),
        draw.fp8(experts, 256, hidden),
        draw.weight_scale(experts, 2, hidden // 128),
        draw.fp8(experts, hidden, 128),
        draw.weight_scale(experts, hidden // 128, 1),
    )
    return Case("MoeExperts", "random", inputs, {"act_quant": "ue8m0"})


def nvfp4_case(tokens: int, top_k: int, *, seed: int, act_quant: str = "ue8m0", hidden: int = 256) -> Case:
    """Return a case whose weights are NVFP4, with a scale for each expert; one has zeros and one the largest values."""
    case = random_case(tokens, top_k, seed=seed, hidden=hidden)
    draw, inputs = Draw(seed + 100), list(case.inputs)
    for at, shape in ((3, (6, 256, hidden)), (5, (6, hidden, 128))):
        values = (draw.normal(*shape) / 16).numpy()
        values[0, :, :32], values[1, :, 16:32] = 0.0, 1.5
        coded = [nvfp4.quantize(one) for one in values]
        inputs[at] = torch.from_numpy(np.stack([nvfp4.to_rows(one) for one in coded]))
        scales = torch.tensor([float(one.tensor_scale) for one in coded])
        inputs[at + 1] = scales[:, None, None].expand(6, shape[1] // 128, shape[2] // 128).contiguous()
    return Case("MoeExperts", "nvfp4", tuple(inputs), {"act_quant": act_quant})


@pytest.mark.parametrize("act_quant", ["ue8m0", "none"])
@pytest.mark.parametrize(("tokens", "sm"), [(1, 100), (9, 120), (30, 120)])
def test_nvfp4_weights_equal_the_reference(tokens: int, sm: int, act_quant: str, form: str) -> None:
    case = nvfp4_case(tokens, 3, seed=tokens, act_quant=act_quant)
    got, (want,) = run(case, sm=sm), case.expected()
    assert calc_diff(got, want) <= TOLERANCE
    assert calc_diff(got * 1.01, want) > TOLERANCE


@pytest.mark.parametrize(("block_m", "sm"), [(16, 100), (64, 100), (32, 120)])
def test_every_tile_of_nvfp4_weights(block_m: int, sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = nvfp4_case(9, 2, seed=block_m)
    monkeypatch.setattr(launch, "choose_tile", lambda a, e, sm, *, nvfp4: launch.tiles(sm, nvfp4=nvfp4)[block_m])
    assert calc_diff(run(case, sm=sm), case.expected()[0]) <= TOLERANCE


@pytest.mark.parametrize("index", [3, 4, 5, 6])
def test_bent_nvfp4_weights_and_scales_are_noticed(index: int, form: str) -> None:
    """Scales by 1 %; of rows, the last two bits of the scale of each block."""
    case = nvfp4_case(2, 2, seed=9)
    inputs = list(case.inputs)
    if index in (4, 6):
        inputs[index] = inputs[index] * 1.01
    else:
        inputs[index] = inputs[index].clone()
        inputs[index][..., inputs[index].shape[-1] * 8 // 9 :] &= -4
    assert calc_diff(run(case, sm=100), moe_experts(*inputs, **case.attrs)) > TOLERANCE  # pyright: ignore[reportArgumentType]


def test_every_nvfp4_code_times_every_scale_is_exact() -> None:
    """All 16 codes under all finite positive scales; f16 holds each, and bf16 too."""
    scales = np.arange(127, dtype=np.uint8)
    codes = np.tile(np.arange(16, dtype=np.uint8), (128, 8))
    blocks = np.concatenate([np.resize(scales, 1016), scales[:8]]).reshape(128, 8)
    rows = nvfp4.to_rows(nvfp4.Nvfp4(codes, blocks.view(ml_dtypes.float8_e4m3fn), np.float32(1)))
    got = torch.empty(128, 128)
    read_nvfp4[(1,)](torch.from_numpy(rows).view(torch.uint8), got)
    assert equal_bits(got.bfloat16().float(), got) and equal_bits(got.half().float(), got)
    assert equal_bits(got + 0.0, torch.from_numpy(nvfp4.from_rows(rows)) + 0.0)


@pytest.mark.parametrize(("block_m", "sm"), [(16, 90), (64, 90), (128, 90), (64, 120)])
def test_every_tile(block_m: int, sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(9, 3, seed=block_m)
    monkeypatch.setattr(launch, "choose_tile", lambda assignments, experts, sm, nvfp4: launch.tiles(sm)[block_m])
    assert calc_diff(run(case, sm=sm), case.expected()[0]) <= TOLERANCE


def test_ids_that_are_no_expert_add_nothing(form: str) -> None:
    case = random_case(4, 3, seed=1)
    ids = case.inputs[1]
    ids[0, 1], ids[2], ids[3, 0] = -1, torch.tensor([-1, 6, 2**31 - 1]), -(2**31)
    outside = (ids < 0) | (ids >= 6)
    inputs = list(case.inputs)
    inputs[1], inputs[2] = ids.masked_fill(outside, 0), inputs[2].masked_fill(outside, 0.0)
    got = run(case)
    assert calc_diff(got, moe_experts(*inputs, **case.attrs)) <= TOLERANCE  # pyright: ignore[reportArgumentType]
    assert (got[2] == 0).all()


def test_an_expert_twice_in_a_row_counts_twice(form: str) -> None:
    case = random_case(2, 2, seed=2)
    case.inputs[1][0] = 3
    got = run(case)
    x, _, weights, *rest = case.inputs
    one = moe_experts(x[:1], torch.tensor([[3]], dtype=torch.int32), weights[:1].sum(1, keepdim=True), *rest, "ue8m0")
    assert calc_diff(got[:1], one) <= TOLERANCE


def test_slices_of_tokens_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(9, 2, seed=3)
    whole = run(case)
    monkeypatch.setattr(launch, "SLICE_TOKENS", 4)
    assert equal_bits(run(case), whole)


def test_rows_do_not_depend_on_the_batch(form: str) -> None:
    case = random_case(6, 2, seed=4)
    got = run(case)
    x, ids, weights, *rest = case.inputs
    order = Draw(5).order(6)
    again = interpret(case.op, (x[order], ids[order], weights[order], *rest), case.attrs, sm=90)[0]
    assert equal_bits(again, got[order])
    assert equal_bits(run(case), got)


def test_the_sum_is_in_slot_order_to_the_bit() -> None:
    draw = Draw(6)
    out, place = draw.normal(8, 128).bfloat16(), torch.tensor([[3, 0, 5], [1, -1, 2]], dtype=torch.int32)
    weights = draw.normal(2, 3)
    want = torch.zeros(2, 128)
    for t in range(2):
        for j in range(3):
            if place[t, j] >= 0:
                want[t] += out[int(place[t, j])].float() * weights[t, j]
    for shared in (0, 128):  # its rows are behind those of six assignments
        y = torch.full((2, 128), torch.nan)
        combine_kernel[(2, 1, 1)](out, place, weights, y, shared, H=128, TOPK=3, BLOCK=1024)
        assert equal_bits(y, want + out[6:].float() if shared else want)


@pytest.mark.parametrize("sm", [80, 90])
def test_few_tokens_are_as_good_as_many(sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks along K that no part of the warps shares evenly, and sums beside those of the grouped form."""
    case = random_case(3, 2, seed=8, hidden=640)
    few = run(case, sm=sm)
    assert calc_diff(few, case.expected()[0]) <= TOLERANCE
    monkeypatch.setattr(launch, "few_tokens", lambda sm: 0)
    assert calc_diff(few, run(case, sm=sm)) <= TOLERANCE


def group(
    ids: list[int], experts: int, block_m: int, chunk: int, *, bent: int = 0
) -> tuple[list[int], list[int], list[list[int]]]:
    """Return order, place and tiles; one program for each `chunk` ids, and counts of two of them at a time.

    `bent` is added to what the first program counted of expert 0.
    """
    count, runs = len(ids), -(-len(ids) // chunk)
    max_tiles = -(-count // block_m) + min(experts, count)
    order, place = torch.full((count + abs(bent),), -9, dtype=torch.int32), torch.full((count,), -9, dtype=torch.int32)
    found = torch.full((3, max_tiles), -9, dtype=torch.int32)
    sizes = {"E": experts, "BINS": 1 << (experts - 1).bit_length(), "CHUNK": chunk}
    given = torch.tensor(ids, dtype=torch.int32)
    counts = torch.full((runs, sizes["BINS"]), -9, dtype=torch.int32)
    if runs > 1:
        count_kernel[(runs, 1, 1)](given, counts, count, **sizes)
        counts[0, 0] += bent
    place_kernel[(runs, 1, 1)](
        given, counts, order, place, found, count, max_tiles, block_m, ROWS=2, COLUMNS=chunk // 2, **sizes
    )
    return order.tolist(), place.tolist(), found.T.tolist()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_grouping_is_a_stable_sort_with_tiles_of_one_expert(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    block_m = data.draw(st.sampled_from([4, 16]))
    ids = data.draw(st.lists(st.integers(-2, experts), min_size=1, max_size=50))
    order, place, found = group(ids, experts, block_m, data.draw(st.sampled_from([8, 16, 64])))
    valid = [i for i, e in enumerate(ids) if 0 <= e < experts]
    want = sorted(valid, key=lambda i: ids[i])
    assert order[: len(want)] == want
    assert place == [want.index(i) if i in valid else -1 for i in range(len(ids))]
    rows = []
    for expert, first, end in found:
        if expert >= 0:
            mine = list(range(first, min(first + block_m, end)))
            assert mine and all(ids[want[row]] == expert for row in mine)
            rows += mine
    assert rows == list(range(len(want)))
    assert all(expert >= -1 for expert, _, _ in found), "tiles past the end are none"


def test_all_ids_of_one_expert_fill_tiles_of_every_program() -> None:
    order, place, found = group([2] * 70, experts=3, block_m=4, chunk=16)
    assert order == place == list(range(70))
    assert found == [[2, 4 * i, 70] for i in range(18)] + found[18:] and [one[0] for one in found[18:]] == [-1] * 3


@pytest.mark.parametrize("count", [256, 257, 600])
def test_one_two_and_three_programs_of_the_real_size_sort(count: int) -> None:
    """The counts of the full model: 256 experts, 256 assignments of each program."""
    ids = Draw(count).integers(count, low=-1, high=256).tolist()
    order, place, _ = group(ids, 256, 16, launch.CHUNK)
    valid = [i for i, e in enumerate(ids) if e >= 0]
    want = sorted(valid, key=lambda i: ids[i])
    assert order[: len(want)] == want and [place[i] for i in want] == list(range(len(want)))


def test_a_count_that_is_one_off_is_noticed() -> None:
    """One assignment more in the first run moves those of later runs and of later experts."""
    ids = [1, 0, 2, 1, 0, 2, 1, 0, 2, 1] * 3
    want = sorted(range(30), key=lambda i: ids[i])
    assert group(ids, 3, 4, 8)[0] == want
    assert group(ids, 3, 4, 8, bent=1)[0] != want


def test_many_programs_group_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the launch plan, which has one launch more."""
    case = random_case(9, 3, seed=7)
    whole = run(case)
    monkeypatch.setattr(launch, "CHUNK", 8)
    monkeypatch.setattr(launch, "COLUMNS", 4)
    assert len(launch.plan(case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs), 90).launches) == 6
    assert equal_bits(run(case), whole)


@settings(max_examples=6, deadline=None)
@given(tokens=st.integers(1, 20), top_k=st.integers(1, 4), sm=st.sampled_from([80, 90, 120]))
def test_any_shape(tokens: int, top_k: int, sm: int) -> None:
    case = random_case(tokens, top_k, seed=tokens)
    assert calc_diff(run(case, sm=sm), case.expected()[0]) <= TOLERANCE
