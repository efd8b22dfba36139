"""Slices, shortcuts and launch plans of the indexer."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.dsa_indexer.launch import SCORE_BYTES, plan, programs_per_row, variants, workspace_bytes
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


@pytest.mark.parametrize(
    ("rows", "length", "programs"),
    [
        *((1, 131072, 64), (4, 131072, 64), (32, 131072, 8), (128, 131072, 2), (129, 131072, 1), (2048, 131072, 1)),
        *((1, 6144, 1), (1, 6208, 4), (5, 131072, 32), (1, 1 << 22, 256)),
    ],
)
def test_few_rows_are_shared_so_that_all_sms_have_work(rows: int, length: int, programs: int) -> None:
    assert programs_per_row(rows, length) == programs
    if rows > 1000:
        return
    found = plan(BOUND | {"B": rows, "Q": 1, "MB": length // 64}, 90)
    names = [one.variant for one in found.launches if one.grid[0] == min(rows, SCORE_BYTES // (4 * length))]
    shared = ["scores-1", "digit-0", "digit-1", "digit-2", "emit"]
    assert names == (shared if programs > 1 else ["scores-1", "select"])
    if programs > 1:
        (emit,) = (one for one in found.launches if one.variant == "emit")
        span = int(emit.arguments["span"])  # pyright: ignore[reportArgumentType]
        assert emit.grid == (rows, programs, 1) and (programs - 1) * span < length <= programs * span


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
