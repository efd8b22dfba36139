"""`MoeRoute` as the rest of the tree knows it."""

from __future__ import annotations

from typing import Any

from seekforge.plugins.moe_route.spec import SPEC
from seekforge.plugins.operator import KernelForm, LibraryForm, Operator, RankModel, Step, Taps


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    config = model.config
    return {
        "E": config.n_routed_experts,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "top_k": config.num_experts_per_tok,
        "norm": config.norm_topk_prob,
    }


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a step."""
    return [{"T": step.batch * step.queries}]


OPERATOR = Operator(
    spec=SPEC,
    in_programs=True,
    body="seekforge.plugins.moe_route.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=True,
    products=None,
    taps=Taps(inputs={"logits": "router_logits"}, outputs={"expert_weights": "expert_weights"}),
    kernels=KernelForm(
        launch="seekforge.plugins.moe_route.launch",
        cost="seekforge.plugins.moe_route.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={},
        known_mma_sync={},
        libraries={
            "flashinfer": LibraryForm(
                launch="seekforge.plugins.moe_route.flashinfer_launch",
                cost="seekforge.plugins.moe_route.cost",
                source="flashinfer.cu",
            )
        },
    ),
)
