"""`Bf16Linear` as the rest of the tree knows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from seekforge.plugins.bf16_linear.spec import SPEC
from seekforge.plugins.linear_tile import FEW_FEATURES
from seekforge.plugins.operator import NO_TAPS, KernelForm, Operator, Products, RankModel, Step


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return nothing: the kernels take any weight."""
    return {}


def step_sizes(model: RankModel, step: Step) -> Iterator[dict[str, Any]]:
    """Yield the sizes of each kind of linear."""
    for n, k in step.bf16_linears:
        yield {"*lead": (step.batch * step.queries,), "N": n, "K": k}


OPERATOR = Operator(
    spec=SPEC,
    in_programs=False,
    body="seekforge.plugins.bf16_linear.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=False,
    products=Products(
        flops=lambda shapes, config, keys: 2.0 * math.prod(shapes["weight"]),
        in_plugin=lambda attrs, shapes: "bf16",
        inlined="f32",
    ),
    taps=NO_TAPS,  # which product of a layer it is, its weight tells
    kernels=KernelForm(
        launch="seekforge.plugins.bf16_linear.launch",
        cost="seekforge.plugins.bf16_linear.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={},
        known_mma_sync={(name, sm): FEW_FEATURES for name in ("narrow-4x8", "narrow-16x16") for sm in (90, 100, 103)},
        libraries={},
    ),
)
