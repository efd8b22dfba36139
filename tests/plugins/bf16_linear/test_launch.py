"""Tiles, splits and launch plans of the bf16 linear: pure functions of shape and SM."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.bf16_linear.launch import choose_tile, plan, variants, workspace_bytes
from seekforge.plugins.kernels.launch_plan import check_plan
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.linear_tile import Tile

HEAD, ROUTER, HEAD_WEIGHTS = (129280, 7168), (256, 7168), (64, 7168)


@pytest.mark.parametrize(
    ("rows", "weight", "sm", "tile"),
    [
        (17, ROUTER, 90, Tile(32, 128, True, 16, 4, 5)),
        (33, HEAD_WEIGHTS, 90, Tile(64, 128, False, 16, 4, 4)),
        (512, ROUTER, 90, Tile(64, 128, False, 14, 4, 4)),
        (2049, ROUTER, 90, Tile(64, 128, False, 1, 4, 4)),
        (4096, HEAD, 90, Tile(128, 128, False, 1, 8, 3)),
        (4096, HEAD, 120, Tile(64, 128, False, 1, 4, 3)),
    ],
)
def test_tiles(rows: int, weight: tuple[int, int], sm: int, tile: Tile) -> None:
    assert choose_tile(rows, *weight, sm) == tile


@pytest.mark.parametrize(("rows", "tile"), [(1, Tile(4, 8, True, 1, 8, 3, 8)), (16, Tile(16, 16, True, 1, 8, 3, 8))])
def test_a_small_weight_and_a_token_or_some_take_one_launch(rows: int, tile: Tile) -> None:
    assert {choose_tile(rows, *weight, sm) for weight in (ROUTER, HEAD_WEIGHTS) for sm in SMS} == {tile}
    assert choose_tile(rows, *HEAD, 90) == Tile(16, 128, True, 1, 4, 5)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 64, 65, 2048, 8192])
def test_plans_name_compiled_variants_and_fit_their_workspace(rows: int, sm: int) -> None:
    for n, k in (HEAD, ROUTER, HEAD_WEIGHTS, (131, 64)):
        bound = {"*lead": (rows,), "N": n, "K": k}
        found = plan(bound, sm)
        check_plan(found, variants({}, sm))
        most = workspace_bytes(bound | {"*lead": (8192,)}, sm)
        assert found.workspace_bytes <= workspace_bytes(bound, sm) <= most
        splits = choose_tile(rows, n, k, sm).splits
        assert len(found.launches) == (1 if splits == 1 else 2)


def test_the_head_needs_no_workspace() -> None:
    assert workspace_bytes({"*lead": (8192,), "N": HEAD[0], "K": HEAD[1]}, 90) == 0


def test_empty_and_wrong_shapes() -> None:
    bound = {"*lead": (0, 5), "N": 128, "K": 128}
    assert plan(bound, 90).launches == ()
    with pytest.raises(ShapeError, match="in features is 100, kernels take a multiple of 64"):
        plan(bound | {"K": 100}, 90)
    with pytest.raises(ShapeError, match=r"out features is 16777216, kernels take below 2\^24"):
        plan(bound | {"N": 1 << 24}, 90)
