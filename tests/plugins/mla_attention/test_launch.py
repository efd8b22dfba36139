"""Splits and launch plans of dense attention."""

from __future__ import annotations

import math

import pytest

from seekforge.common.errors import ShapeError
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.kernels.launch_plan import check_plan, statics_of
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.mla_attention.launch import choose_splits, plan, variants, workspace_bytes

V3 = {"H": 128, "C": 512, "R": 64, "kv_format": "bf16"}
BOUND = V3 | {"MB": 2048, "scale": 0.135, "*latent": (70_000, 576)}


@pytest.mark.parametrize(
    ("rows", "num_blocks", "splits"),
    [(1, 2048, 128), (1, 1, 2), (1, 40, 80), (16, 2048, 8), (17, 2048, 7), (64, 2048, 2), (65, 2048, 1)],
)
def test_splits_fill_the_gpu_within_the_workspace(rows: int, num_blocks: int, splits: int) -> None:
    assert choose_splits(rows, num_blocks, 32) == splits


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("heads", [16, 128])
def test_one_token_fills_the_largest_card(sm: int, heads: int) -> None:
    """Also on a rank that has 16 of the heads: some hundred programs."""
    found = plan(BOUND | {"B": 1, "Q": 1, "H": heads}, sm)
    assert [one.variant for one in found.launches] == ["part", "combine"]
    assert math.prod(found.launches[0].grid) >= 128


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(("b", "q"), [(1, 1), (321, 1), (74, 3), (4, 255), (2, 256), (1, 8192), (1, 70_000)])
@pytest.mark.parametrize("num_blocks", [1, 2048])
def test_plans_name_compiled_variants_and_fit_their_workspace(b: int, q: int, num_blocks: int, sm: int) -> None:
    bound = BOUND | {"B": b, "Q": q, "MB": num_blocks}
    found = plan(bound, sm)
    check_plan(found, variants(V3, sm))
    assert found.workspace_bytes <= workspace_bytes(bound, sm)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("heads", [1, 16, 17, 128])
def test_a_tile_of_positions_lies_in_one_block(sm: int, heads: int) -> None:
    """The kernel looks one block number up for it."""
    sizes = {one.constants["BLOCK_N"] for one in variants(V3 | {"H": heads}, sm) if "BLOCK_N" in one.constants}
    assert len(sizes) == 1 and all(BLOCK_SIZE % int(size) == 0 for size in sizes)


def test_a_small_batch_fits_the_workspace_of_a_large_one() -> None:
    most = workspace_bytes(BOUND | {"B": 256, "Q": 2048}, 90)
    assert all(plan(BOUND | {"B": b, "Q": 1}, 90).workspace_bytes <= most for b in range(1, 257))


def test_nothing_to_do() -> None:
    assert plan(BOUND | {"B": 0, "Q": 1}, 90).launches == ()


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"C": 96}, "kv_lora_rank is 96"),
        ({"R": 48}, "rope_head_dim is 48"),
        ({"kv_format": "f32"}, "kv_format is f32, kernels read bf16; f32 caches are for the CPU"),
        ({"kv_format": "fp8_ds"}, "kv_format is fp8_ds, kernels read bf16"),
    ],
)
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("MlaAttention", V3 | changed)
