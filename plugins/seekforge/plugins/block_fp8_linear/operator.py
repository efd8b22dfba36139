"""`BlockFp8Linear` as the rest of the tree knows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from seekforge.plugins.block_fp8_linear.spec import FOLDED, SPEC
from seekforge.plugins.linear_tile import FEW_FEATURES
from seekforge.plugins.operator import NO_TAPS, FoldedForm, KernelForm, Operator, Products, RankModel, Step

_AHEAD = "scales of the next pass beside two programs' sums on an SM; by the model worth it"


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for; they take any weight."""
    return {"act_quant": model.numerics["act_quant"]}


def step_sizes(model: RankModel, step: Step) -> Iterator[dict[str, Any]]:
    """Yield the sizes of each kind of linear."""
    for n, k in step.fp8_linears:
        yield {"*lead": (step.batch, step.queries), "N": n, "K": k}


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.block_fp8_linear.function:body",
    inlined_limits=(),
    inlined_weights="float8",
    inlined_scratch=None,
    folded=FoldedForm(
        op_type=FOLDED,
        body="seekforge.plugins.block_fp8_linear.function:folded_body",
        quantized="MatMulNBits",
        native=False,
    ),
    native=False,
    products=Products(
        flops=lambda shapes, config, keys: 2.0 * math.prod(shapes["weight"]),
        in_plugin=lambda attrs, shapes: "fp8" if attrs["act_quant"] == "ue8m0" else "bf16",
        inlined="bf16",
    ),
    taps=NO_TAPS,  # which linear of a layer it is, its weight tells
    kernels=KernelForm(
        launch="seekforge.plugins.block_fp8_linear.launch",
        cost="seekforge.plugins.block_fp8_linear.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={
            ("tile-128x128", 90): (16, _AHEAD),
            ("tile-128x128-split", 90): (8, _AHEAD),
        },
        known_mma_sync={
            (f"narrow-{rows}x{features}{form}", sm): FEW_FEATURES
            for sm, most in ((90, 64), (100, 32), (103, 32))
            for rows in (2, 4, 16, 32, 64)
            for features in (16, 32)
            for form in (("", "-quantize") if rows <= 4 else ("",))
            if rows <= most
        },
        libraries={},
    ),
)
