"""Launch plans of the cache write, and what it refuses."""

from __future__ import annotations

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.dsa_cache_write.launch import plan, variants
from seekforge.plugins.kernels.launch_plan import check_plan, statics_of
from seekforge.plugins.kernels.sm_limits import SMS

V32 = {"C": 512, "R": 64, "D": 128, "kv_format": "fp8_ds", "index_format": "fp8_ds"}
V32 |= {"kv_fp8": True, "indexer_fp8": True}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(("kv_format", "slots"), [("fp8_ds", 64 * 1000), ("bf16", 1000)])
def test_four_tokens_per_program(kv_format: str, slots: int, sm: int) -> None:
    statics = V32 | {"kv_format": kv_format, "index_format": kv_format}
    found = plan(statics | {"B": 3, "Q": 3, "*latent": (1000, 64, 656)}, sm)
    check_plan(found, variants(statics, sm))
    assert [one.grid for one in found.launches] == [(3, 1, 1)]
    assert found.launches[0].arguments["num_slots"] == slots


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"C": 384}, "kv_lora_rank is 384"),
        ({"R": 24}, "qk_rope_head_dim is 24"),
        ({"D": 64}, "index_head_dim is 64"),
        ({"kv_format": "f32"}, "f32 caches are for the CPU"),
        ({"kv_fp8": False}, "kv_format fp8_ds needs kv_fp8"),
    ],
)
def test_refusals_are_sentences(changed: dict, fault: str) -> None:
    with pytest.raises(ShapeError, match=fault):
        statics_of("DsaCacheWrite", V32 | changed)
