"""Launch plans of the router, and what it refuses."""

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.launch_plan import check_plan, statics_of
from seekforge.plugins.moe_route.launch import plan, variants

V32 = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}


@pytest.mark.parametrize(("tokens", "programs"), [(1, 1), (4, 1), (5, 2), (8192, 2048), (300_000, 75_000)])
def test_four_tokens_per_program(tokens: int, programs: int) -> None:
    found = plan(V32 | {"T": tokens, "scale": 2.5}, 90)
    check_plan(found, variants(V32, 90))
    assert [launch.grid for launch in found.launches] == [(programs, 1, 1)]
    assert found.launches[0].arguments["scale"] == 2.5


def test_no_tokens_no_launch() -> None:
    assert plan(V32 | {"T": 0, "scale": 2.5}, 90).launches == ()


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"top_k": 22}, "num_experts_per_tok is 22, kernels take 1 to 16"),
        ({"E": 160}, "n_routed_experts is 160"),
        ({"E": 2048}, "n_routed_experts is 2048"),
        ({"n_group": 3}, "n_group is 3"),
        ({"n_group": 256}, "n_group is 256"),
        ({"n_group": 128, "topk_group": 2}, "has fewer"),
    ],
)
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("MoeRoute", V32 | changed)
