"""Tiles, splits and launch plans of the FP8 linear: pure functions of shape and SM."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.block_fp8_linear.launch import choose_tile, plan, variants, workspace_bytes
from seekforge.plugins.kernels.launch_plan import check_plan
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.linear_tile import Tile


@pytest.mark.parametrize(("n", "features"), [(2112, 16), (24576, 32), (7168, 32), (4096, 16), (16, 16), (36864, 32)])
def test_programs_of_few_rows_follow_the_weight_alone(n: int, features: int) -> None:
    """So that a row is the same beside any others."""
    for sm, most in ((80, 64), (90, 64), (100, 32)):
        tiles = [choose_tile(rows, n, 7168, sm, quant=True) for rows in range(1, most + 1)]
        assert {(tile.block_n, tile.parts, tile.splits) for tile in tiles} == {(features, 4, 1)}
        assert all(rows <= tile.block_t for rows, tile in enumerate(tiles, 1)), "all rows in one program"


@pytest.mark.parametrize(
    ("rows", "sm", "tile"),
    [
        (1, 90, Tile(2, 16, True, 1, 4, 3, 4)),
        (17, 90, Tile(32, 16, True, 1, 4, 3, 4)),
        (17, 100, Tile(32, 16, True, 1, 4, 3, 4)),
        (33, 120, Tile(64, 16, True, 1, 4, 3, 4)),
        (33, 103, Tile(64, 128, False, 8, 4, 3)),
        (128, 90, Tile(64, 128, False, 5, 4, 3)),
        (2049, 90, Tile(64, 128, False, 1, 4, 3)),
        (4096, 90, Tile(128, 128, False, 1, 4, 3)),
        (8192, 100, Tile(128, 128, False, 1, 8, 3)),
        (8192, 80, Tile(64, 128, False, 1, 4, 3)),
        (8192, 121, Tile(64, 128, False, 1, 4, 3)),
    ],
)
def test_tiles(rows: int, sm: int, tile: Tile) -> None:
    assert choose_tile(rows, 2112, 7168, sm, quant=True) == tile


@pytest.mark.parametrize("sm", SMS)
def test_rows_that_are_not_quantized_are_cut_into_64(sm: int) -> None:
    assert {choose_tile(rows, 7168, 16384, sm, quant=False).block_t for rows in (65, 512, 8192)} == {64}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 64, 65, 512, 8192])
@pytest.mark.parametrize("quant", ["ue8m0", "none"])
def test_plans_name_compiled_variants_and_fit_their_workspace(rows: int, sm: int, quant: str) -> None:
    for n, k in ((576, 7168), (7168, 16384), (64, 128), (36864, 7168)):
        bound = {"*lead": (rows,), "N": n, "K": k, "act_quant": quant}
        found = plan(bound, sm)
        check_plan(found, variants({"act_quant": quant}, sm))
        most = workspace_bytes(bound | {"*lead": (8192,)}, sm)
        assert found.workspace_bytes <= workspace_bytes(bound, sm) <= most
        splits = choose_tile(rows, n, k, sm, quant=quant == "ue8m0").splits
        assert len(found.launches) == (quant == "ue8m0" and rows > 4) + 1 + (splits > 1)


def test_sums_of_splits_take_no_more_than_the_largest_that_is_split() -> None:
    bound = {"N": 7168, "K": 16384, "act_quant": "none"}
    asked = workspace_bytes(bound | {"*lead": (4096,)}, 90)
    rows = [rows for rows in range(1, 4097) if choose_tile(rows, 7168, 16384, 90, quant=False).splits > 1]
    assert asked == max(plan(bound | {"*lead": (one,)}, 90).workspace_bytes for one in rows)


def test_empty_and_wrong_shapes() -> None:
    bound = {"*lead": (0, 5), "N": 128, "K": 128, "act_quant": "ue8m0"}
    assert plan(bound, 90).launches == ()
    with pytest.raises(ShapeError, match="in features is 100, kernels take a multiple of 128"):
        plan(bound | {"K": 100}, 90)
    with pytest.raises(ShapeError, match=r"out features is 16777216, kernels take below 2\^24"):
        plan(bound | {"N": 1 << 24}, 90)
    with pytest.raises(ShapeError, match=r"in features is 16777216, kernels take below 2\^24"):
        plan(bound | {"K": 1 << 24}, 90)
