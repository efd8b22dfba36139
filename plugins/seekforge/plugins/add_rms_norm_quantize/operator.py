"""`AddRmsNormQuantize` as the rest of the tree knows it."""

from __future__ import annotations

from typing import Any

from seekforge.plugins.add_rms_norm_quantize.spec import SPEC
from seekforge.plugins.operator import NO_TAPS, KernelForm, Operator, RankModel, Step


def static_sizes(model: RankModel) -> dict[str, Any]:
    """Return nothing: the kernels take rows of any width."""
    return {}


def step_sizes(model: RankModel, step: Step) -> list[dict[str, Any]]:
    """Return the sizes of a layer's norms before attention and MLP."""
    width = model.config.hidden_size
    return [{"*lead": (step.batch, step.queries), "H": width, "R": width, "epsilon": model.config.rms_norm_eps}]


OPERATOR = Operator(
    spec=SPEC,
    in_programs=False,
    body="seekforge.plugins.add_rms_norm_quantize.function:body",
    inlined_limits=(),
    inlined_weights=None,
    inlined_scratch=None,
    folded=None,
    native=False,
    products=None,
    taps=NO_TAPS,  # its values have the names that they had
    kernels=KernelForm(
        launch="seekforge.plugins.add_rms_norm_quantize.launch",
        cost="seekforge.plugins.add_rms_norm_quantize.cost",
        static_sizes=static_sizes,
        step_sizes=step_sizes,
        known_spills={},
        known_mma_sync={},
        libraries={},
    ),
)
