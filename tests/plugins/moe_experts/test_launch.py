"""Tiles, slices and launch plans of the experts."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError, TargetError
from seekforge.plugins.kernels.launch_plan import Buffer, check_plan, statics_of
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.moe_experts.launch import choose_tile, plan, variants, workspace_bytes

V32 = {"E": 256, "TOPK": 8, "H": 7168, "I2": 4096, "W13": 7168, "act_quant": "ue8m0"}


@pytest.mark.parametrize(
    ("tokens", "sm", "block_m"),
    [(1, 90, 16), (256, 90, 16), (257, 90, 64), (1536, 90, 64), (1537, 90, 128), (8192, 120, 64), (8192, 80, 64)],
)
def test_tiles_follow_the_rows_per_expert(tokens: int, sm: int, block_m: int) -> None:
    assert choose_tile(8 * tokens, 256, sm).block_m == block_m


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("quant", ["ue8m0", "none"])
@pytest.mark.parametrize("tokens", [9, 256, 257, 2048, 2049, 8192])
def test_plans_name_compiled_variants_and_fit_their_workspace(tokens: int, quant: str, sm: int) -> None:
    bound = V32 | {"T": tokens, "act_quant": quant}
    found = plan(bound, sm)
    check_plan(found, variants(V32 | {"act_quant": quant}, sm))
    most = workspace_bytes(bound | {"T": 8192}, sm)
    assert found.workspace_bytes <= workspace_bytes(bound, sm) <= most < 310e6
    counting = sum(8 * min(2048, tokens - first) > 256 for first in range(0, tokens, 2048))
    assert len(found.launches) == -(-tokens // 2048) * (5 if quant == "ue8m0" else 4) + counting


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("quant", ["ue8m0", "none"])
def test_few_tokens_take_two_launches(quant: str, sm: int) -> None:
    most, up = 4 if sm == 80 else 8, "narrow-up-quantize" if quant == "ue8m0" else "narrow-up"
    for tokens in range(1, most + 1):
        bound = V32 | {"T": tokens, "act_quant": quant}
        found = plan(bound, sm)
        check_plan(found, variants(V32 | {"act_quant": quant}, sm))
        assert [one.variant for one in found.launches] == [up, "narrow-down"]
        assert [one.grid for one in found.launches] == [(8 * tokens, 128, 1), (448, tokens, 1)]
        assert found.workspace_bytes <= workspace_bytes(bound, sm)
    assert len(plan(V32 | {"T": most + 1, "act_quant": quant}, sm).launches) >= 4


def test_a_wide_expert_has_room_for_few_tokens() -> None:
    wide = V32 | {"H": 128, "W13": 128, "I2": 8192, "T": 3}
    assert plan(wide, 90).workspace_bytes <= workspace_bytes(wide, 90) <= workspace_bytes(wide | {"T": 9}, 90)


def test_grouping_has_a_program_for_each_256_assignments() -> None:
    by_name = {one.variant: one for one in plan(V32 | {"T": 2048}, 90).launches}
    assert by_name["count"].grid == by_name["place"].grid == (64, 1, 1)
    assert [one.variant for one in plan(V32 | {"T": 32}, 90).launches][:2] == ["place", "quantize"]


SHARED = {"HB": 56, "S2": 4096}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("tokens", [1, 9, 257, 2049])
@pytest.mark.parametrize("rank", [{}, {"E": 32, "S2": 512}])
def test_a_shared_expert_and_quantized_rows_take_no_launch_more(tokens: int, rank: dict, sm: int) -> None:
    alone, bound = V32 | {"T": tokens}, V32 | SHARED | {"T": tokens} | rank
    found = plan(bound, sm)
    check_plan(found, variants(V32 | ({"E": 32} if rank else {}), sm))
    assert found.workspace_bytes <= workspace_bytes(bound, sm)
    quantizers = sum(one.variant == "quantize" for one in plan(alone, sm).launches)
    assert len(found.launches) == len(plan(alone, sm).launches) - quantizers
    read = {place.name for one in found.launches for place in one.arguments.values() if isinstance(place, Buffer)}
    assert {"x_codes", "x_scale", "shared_w13", "shared_w2_scale"} <= read and "x" not in read


def test_rows_of_a_shared_expert_stand_behind_all_others() -> None:
    up, down = (one.grid for one in plan(V32 | SHARED | {"T": 3}, 90).launches)
    assert up == (27, 128, 1) and down == (448, 3, 1)
    by_name = {one.variant: one for one in plan(V32 | SHARED | {"T": 32}, 90).launches}
    most = by_name["place"].arguments["max_tiles"]
    assert most == 256 // 16 + 256 and by_name["up-16"].grid == (most + 2, 16, 1)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"S2": 8192}, "a shared expert of width 4096 beside FP8 ones of 2048"),
        ({"S2": 384}, "a shared expert of width 192 beside FP8"),
        ({"W13": 4032}, "a shared expert of width 2048 beside NVFP4 ones"),
        ({"HB": 55}, "x_scale has 55 blocks"),
        ({"act_quant": "none"}, "act_quant is none"),
    ],
)
def test_other_shared_experts_and_rows_are_refused(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        plan(V32 | SHARED | {"T": 1} | changed, 100)


NVFP4 = V32 | {"W13": 4032}


@pytest.mark.parametrize("sm", [100, 103, 120, 121])
@pytest.mark.parametrize("quant", ["ue8m0", "none"])
@pytest.mark.parametrize("tokens", [1, 257, 2049])
def test_nvfp4_plans_are_those_of_fp8_weights_with_other_products(tokens: int, quant: str, sm: int) -> None:
    bound = NVFP4 | {"T": tokens, "act_quant": quant}
    found = plan(bound, sm)
    made = variants(NVFP4 | {"act_quant": quant}, sm)
    check_plan(found, made)
    assert found.workspace_bytes <= workspace_bytes(bound, sm)
    fp8 = bound | {"W13": 7168}
    assert workspace_bytes(bound, sm) == workspace_bytes(fp8, sm)
    names = [one.variant.replace("-nvfp4", "") for one in found.launches]
    assert names[:2] == [one.variant for one in plan(fp8, sm).launches][:2] and len(names) == len(
        plan(fp8, sm).launches
    )
    assert {one.types["w_ptr"] for one in made if one.main_loop} == {"*u8"}
    assert all(one.constants["NVFP4"] for one in made if one.main_loop)


@pytest.mark.parametrize("sm", [80, 89, 90])
def test_sms_before_blackwell_take_no_nvfp4(sm: int) -> None:
    with pytest.raises(TargetError, match=f"sm {sm} takes no NVFP4 weights, SMs from 100 on do; build with FP8 ones"):
        variants(NVFP4, sm)


def test_no_tokens_no_launch() -> None:
    assert plan(V32 | {"T": 0}, 90).launches == ()


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"I2": 2 * 1400}, "moe_intermediate_size is 1400, kernels take a multiple of 128"),
        ({"H": 7000, "W13": 7000}, "hidden_size is 7000"),
        ({"TOPK": 22}, "num_experts_per_tok is 22"),
        ({"E": 2048}, "n_routed_experts is 2048"),
        ({"W13": 3584}, r"rows of w13 have 3584 bytes, kernels take 7168 \(FP8\) or 4032 \(NVFP4\)"),
    ],
)
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("MoeExperts", V32 | changed)
