"""Launch plans of the write of latents, and what it refuses."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.launch_plan import check_plan, statics_of
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.mla_cache_write.launch import plan, variants

GLM = {"C": 512, "R": 64, "kv_format": "fp8_ds", "kv_fp8": True}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(("kv_format", "slots"), [("fp8_ds", 64 * 1000), ("bf16", 1000)])
def test_four_tokens_per_program(kv_format: str, slots: int, sm: int) -> None:
    statics = GLM | {"kv_format": kv_format}
    made = plan(statics | {"B": 3, "Q": 3, "*latent": (1000, 64, 656)}, sm)
    check_plan(made, variants(statics, sm))
    assert [one.grid for one in made.launches] == [(3, 1, 1)]
    assert made.launches[0].arguments["num_slots"] == slots


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"C": 384}, "kv_lora_rank is 384"),
        ({"R": 24}, "qk_rope_head_dim is 24"),
        ({"kv_format": "f32"}, "f32 caches are for the CPU"),
        ({"kv_fp8": False}, "kv_format fp8_ds needs kv_fp8"),
    ],
)
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("MlaCacheWrite", GLM | changed)
