"""Slices, shortcuts and launch plans of the indexer."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.dsa_indexer.launch import SCORE_BYTES, plan, variants, workspace_bytes
from seekforge.plugins.kernels.launch_plan import check_plan, statics_of
from seekforge.plugins.kernels.sm_limits import SMS

V32 = {"Hi": 64, "D": 128, "indexer_fp8": True, "index_format": "fp8_ds"}
BOUND = V32 | {"MB": 2048, "index_topk": 2048, "*index": (70_000, 8448)}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(("b", "q"), [(1, 1), (256, 1), (64, 3), (1, 2048), (2, 8192), (1, 70_000)])
def test_plans_name_compiled_variants_and_fit_their_workspace(b: int, q: int, sm: int) -> None:
    bound = BOUND | {"B": b, "Q": q}
    found = plan(bound, sm)
    check_plan(found, variants(V32, sm))
    assert found.workspace_bytes <= workspace_bytes(bound, sm) <= SCORE_BYTES


def test_every_row_is_selected_once() -> None:
    found = plan(BOUND | {"B": 3, "Q": 700}, 90)
    rows = [(one.arguments["first_row"], one.grid[0]) for one in found.launches if one.variant == "select"]
    assert [first for first, _ in rows] == [0, 512, 1024, 1536, 2048]
    assert sum(count for _, count in rows) == 2100


def test_a_table_that_fits_is_not_scored() -> None:
    found = plan(BOUND | {"B": 4, "Q": 1, "MB": 32}, 90)
    assert [one.variant for one in found.launches] == ["select"]
    assert found.workspace_bytes == 0


def test_nothing_to_do() -> None:
    assert plan(BOUND | {"B": 0, "Q": 1}, 90).launches == ()


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"Hi": 8}, "index_n_heads is 8"),
        ({"D": 64}, "index_head_dim is 64"),
        ({"indexer_fp8": False}, "needs indexer_fp8"),
        ({"index_format": "f32"}, "for the CPU"),
    ],
)
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("DsaIndexer", V32 | changed)
