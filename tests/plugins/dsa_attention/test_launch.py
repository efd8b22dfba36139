"""Tiles, splits and launch plans of sparse attention."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.dsa_attention.launch import choose_cut, choose_splits, plan, variants, workspace_bytes
from seekforge.plugins.kernels.launch_plan import check_plan, statics_of
from seekforge.plugins.kernels.sm_limits import SMS

V32 = {"H": 128, "C": 512, "R": 64, "kv_format": "fp8_ds"}
BOUND = V32 | {"MB": 2048, "TOPK": 2048, "scale": 0.135, "*latent": (70_000, 64, 656)}


@pytest.mark.parametrize(
    ("rows", "programs", "topk", "splits"),
    [
        (1, 4, 2048, 32),  # 128 programs of 2 steps
        (2, 4, 2048, 16),
        (1, 1, 2048, 32),  # a rank of eight: no more than are combined at once
        (1, 4, 64, 2),  # no more than there are steps
        (8, 4, 2048, 4),
        (16, 4, 2048, 2),
        (17, 4, 2048, 5),  # 68 programs would leave half of the GPU without work: 3 waves of 13 steps, not one of 64
        (32, 4, 2048, 1),
        (128, 4, 2048, 1),
        (70_000, 4, 2048, 1),
    ],
)
def test_splits_fill_the_gpu_within_the_workspace(rows: int, programs: int, topk: int, splits: int) -> None:
    assert choose_splits(rows, programs, topk, 32) == splits


def test_where_two_programs_share_an_sm_more_parts_fill_the_gpu() -> None:
    assert choose_splits(32, 4, 2048, 32, per_sm=2) == 2


@pytest.mark.parametrize(
    ("heads", "c", "sm", "from_bytes", "programs"),
    [
        (128, 512, 90, True, 4),  # 64 heads and 256 columns of each
        (128, 512, 90, False, 4),
        (128, 512, 100, True, 4),  # 32 heads and all columns
        (128, 128, 90, True, 2),
        (16, 512, 100, True, 2),
        (16, 512, 100, False, 1),
        (17, 512, 90, True, 2),
    ],
)
def test_programs_share_heads_and_columns(heads: int, c: int, sm: int, from_bytes: bool, programs: int) -> None:
    assert choose_cut(heads, c, sm, from_bytes=from_bytes).programs(heads, c) == programs


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("kv_format", ["bf16", "fp8_ds"])
@pytest.mark.parametrize(("b", "q"), [(1, 1), (321, 1), (74, 3), (4, 255), (2, 256), (1, 8192), (1, 70_000)])
def test_plans_name_compiled_variants_and_fit_their_workspace(b: int, q: int, kv_format: str, sm: int) -> None:
    bound = BOUND | {"B": b, "Q": q, "kv_format": kv_format}
    found = plan(bound, sm)
    check_plan(found, variants(V32 | {"kv_format": kv_format}, sm))
    assert found.workspace_bytes <= workspace_bytes(bound, sm)


def test_a_small_batch_fits_the_workspace_of_a_large_one() -> None:
    most = workspace_bytes(BOUND | {"B": 256, "Q": 2048}, 90)
    assert all(plan(BOUND | {"B": b, "Q": 1}, 90).workspace_bytes <= most for b in range(1, 257))


def test_nothing_to_do() -> None:
    assert plan(BOUND | {"B": 0, "Q": 1}, 90).launches == ()


@pytest.mark.parametrize(("changed", "fault"), [({"C": 96}, "kv_lora_rank is 96"), ({"R": 48}, "rope_head_dim is 48")])
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("DsaAttention", V32 | changed)
