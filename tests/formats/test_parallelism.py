"""The layout of ranks: their numbers, their sizes, and how it is written."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from seekforge.common.errors import ConfigError
from seekforge.common.records import RecordError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.formats.parallelism import ONE_RANK, Coordinates, Parallelism
from seekforge.formats.program import Program


def test_ranks_are_numbered_as_vllm_does() -> None:
    layout = Parallelism(tp=2, pp=3, dp=2)
    assert (layout.num_ranks, layout.num_gpus) == (6, 12)
    places = [layout.coordinates(rank) for rank in range(layout.num_gpus)]
    assert places[:3] == [Coordinates(0, 0, 0), Coordinates(0, 0, 1), Coordinates(0, 1, 0)]
    assert places[-1] == Coordinates(1, 2, 1) and len(set(places)) == 12
    with pytest.raises(ConfigError, match="rank 12: expected 0 to 11 of TP2·PP3·DP2"):
        layout.coordinates(12)


def test_experts_are_dealt_out_among_tensor_parallel_ranks() -> None:
    config = load_preset("full").config
    cut, dealt = Parallelism(tp=8).rank_sizes(config), Parallelism(tp=8, pp=2, dp=4, ep=True).rank_sizes(config)
    assert (cut.n_routed_experts, cut.moe_intermediate_size) == (256, 256)
    assert (dealt.n_routed_experts, dealt.moe_intermediate_size) == (32, 2048)
    assert cut.num_attention_heads == dealt.num_attention_heads == 16
    assert cut.shared_intermediate_size == dealt.shared_intermediate_size == 256


@pytest.mark.parametrize(
    ("layout", "words", "options"),
    [
        (ONE_RANK, "1 GPU", ""),
        (Parallelism(tp=8), "TP8", "--tp 8"),
        (Parallelism(tp=8, pp=2, dp=3, ep=True), "TP8·EP8·PP2·DP3", "--tp 8 --pp 2 --ep"),
    ],
)
def test_a_layout_is_written(layout: Parallelism, words: str, options: str) -> None:
    assert (str(layout), layout.options) == (words, options)
    assert Parallelism.model_validate(layout.model_dump(mode="json")) == layout


@pytest.mark.parametrize(
    ("pp", "stages", "fits"),
    [
        (1, [[0, 4]], True),
        (2, [[0, 3], [3, 4]], True),
        (2, [[0, 4]], False),
        (1, [[0, 2], [2, 4]], False),
        (2, [[0, 2], [3, 4]], False),
        (2, [[0, 4], [4, 4]], False),
        (2, [[0, 2], [2, 5]], False),
        (1, [], False),
    ],
)
def test_stages_of_a_program_have_each_layer_once(pp: int, stages: list[list[int]], fits: bool) -> None:
    raw = {name: {} for name in ("numerics", "config", "ops", "graphs", "unused", "shared")} | {
        "format": 3, "seekforge_version": "0", "opset": 23, "layer_range": [0, 4], "files": [],
        "parallelism": {"pp": pp}, "pipeline_stages": stages,
    }  # fmt: skip
    with nullcontext() if fits else pytest.raises(RecordError, match="pipeline_stages"):
        Program.model_validate(raw)


@pytest.mark.parametrize(
    ("parallelism", "message"),
    [
        ({"dp": 2}, r"parallelism\.dp.*is 2, expected 1"),
        ({"tp": 10**9}, r"parallelism.*is of 1,000,000,000 ranks, expected at most 4,096"),
    ],
)
def test_a_program_is_that_of_one_replica_with_a_number_of_ranks_that_exists(
    parallelism: dict[str, int], message: str
) -> None:
    raw = {name: {} for name in ("numerics", "config", "ops", "graphs", "unused", "shared")} | {
        "format": 3, "seekforge_version": "0", "opset": 23, "layer_range": [0, 4], "files": [],
        "parallelism": parallelism, "pipeline_stages": [[0, 4]],
    }  # fmt: skip
    with pytest.raises(RecordError, match=message):
        Program.model_validate(raw)


def test_sizes_are_positive_numbers() -> None:
    with pytest.raises(RecordError, match="is 0, expected at least 1"):
        Parallelism(tp=0)
