"""Launch plans of the norm: one launch, whatever the step, and what is refused."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.add_rms_norm_quantize.launch import plan, variants, workspace_bytes
from seekforge.plugins.kernels.launch_plan import Buffer, check_plan
from seekforge.plugins.kernels.sm_limits import SMS

BOUND = {"*lead": (3, 5), "H": 7168, "R": 7168, "epsilon": 1e-6}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(
    ("width", "kernel"), [(128, "norm-4"), (640, "norm-16"), (2048, "norm-16"), (7168, "norm-64"), (16384, "norm-128")]
)
def test_one_program_for_each_row(width: int, kernel: str, sm: int) -> None:
    found = plan(BOUND | {"H": width, "R": width}, sm)
    check_plan(found, variants({}, sm))
    (launch,) = found.launches
    assert (launch.variant, launch.grid) == (kernel, (15, 1, 1))
    assert found.workspace_bytes == workspace_bytes(BOUND, sm) == 0


def test_without_a_residual_nothing_of_it_is_named() -> None:
    (launch,) = plan(BOUND | {"R": 0}, 90).launches
    assert launch.arguments["residual_ptr"] == Buffer("x") and launch.arguments["adds"] == 0
    assert plan(BOUND | {"*lead": (0, 5)}, 90).launches == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"H": 192, "R": 192}, "width of a norm is 192, kernels take a multiple of 128"),
        ({"H": 32768, "R": 0}, "width of a norm is 32768, kernels take 128 to 16384"),
        ({"R": 128}, "rows of residual have 128 values, those of x 7168"),
    ],
)
def test_wrong_widths_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        plan(BOUND | change, 90)
