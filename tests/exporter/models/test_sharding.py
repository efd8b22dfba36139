"""What divides a model: one rule for plan and export, read off the table of parameters."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models import family_of
from seekforge.exporter.models.sharding import check_parallelism, fault_of
from seekforge.exporter.planner.answer import GPU_COUNTS, layouts
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism


@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("name", ["tiny", "tiny-v3", "small", "full"])
def test_what_plan_proposes_can_be_exported(name: str, ep: bool) -> None:
    config = load_preset(name).config
    proposed = [one for count in GPU_COUNTS for one in layouts(count, config, ep=ep)]
    assert len({one.num_gpus for one in proposed}) == len(GPU_COUNTS)
    for one in proposed:
        check_parallelism(config, one)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, "--tp 3: num_attention_heads is 128, expected equal parts for 3 ranks; pass --tp 2 or --tp 4"),
        (
            {"tp": 32},
            "--tp 32: intermediate_size is 18432, expected equal parts for 32 ranks in whole blocks of 128 rows "
            "(18432 in all); pass --tp 16",
        ),
        ({"tp": 256, "ep": True}, "--tp 256 --ep: num_attention_heads is 128, expected equal parts for 256 ranks"),
        ({"pp": 62}, "--pp 62: num_hidden_layers is 61, expected a layer for each of 62 stages; pass --pp 61"),
        ({"ep": True}, "--ep: there is one rank to deal experts out to; pass --tp 2"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_nearest(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_parallelism(load_preset("full").config, Parallelism(**layout))


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("pp", [1, 2, 61])
def test_usual_layouts_divide_the_full_model(tp: int, pp: int) -> None:
    for ep in (False, tp > 1):
        check_parallelism(load_preset("full").config, Parallelism(tp=tp, pp=pp, ep=ep))


def test_experts_that_are_dealt_out_whole_are_counted_and_not_cut() -> None:
    raw = load_preset("full").config_json
    narrow = ModelConfig.parse(raw | {"moe_intermediate_size": 128, "n_shared_experts": 8}, "narrow")
    assert "moe_intermediate_size is 128" in str(fault_of(narrow, Parallelism(tp=2)))
    assert fault_of(narrow, Parallelism(tp=8, ep=True)) is None
    odd = ModelConfig.parse(raw | {"n_routed_experts": 248, "n_group": 8}, "odd")
    assert "n_routed_experts is 248, expected equally many" in str(fault_of(odd, Parallelism(tp=16, ep=True)))


def test_replicas_are_whole_models() -> None:
    config = load_preset("tiny").config
    assert fault_of(config, Parallelism(dp=1000)) is None


@pytest.mark.parametrize("preset", ["tiny", "tiny-v3"])
def test_a_tensor_that_is_divided_says_along_what(preset: str) -> None:
    config = load_preset(preset).config
    family = family_of(config)
    layers = [family.layer_tensors(config, layer) for layer in range(config.num_hidden_layers)]
    for tensor in (one for tensors in (*family.end_tensors(config), *layers) for one in tensors):
        told = dataclasses.astuple(tensor)[4:7]
        if tensor.sharding == "none":
            assert told == (None, 1, ""), tensor.name
        else:
            assert tensor.axis is not None and tensor.units_key and tensor.shape[tensor.axis] % tensor.units == 0
