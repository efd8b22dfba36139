"""Shapes of an engine: what each profile takes, and the memory that its largest step needs."""

from __future__ import annotations

import math

import pytest

from seekforge.exporter.builder.tensorrt.check import Inputs
from seekforge.exporter.builder.tensorrt.memory import expected_bytes
from seekforge.exporter.builder.tensorrt.profiles import axis_bounds, largest_step, pool_blocks, spanning
from seekforge.exporter.sizing.memory import Workload, activation_bytes, scratch_bytes
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import all_targets, load_target


def test_profiles_keep_the_limits(inputs: Inputs) -> None:
    target = load_target("rtx4090", ["limits.max_batch_size=3", "limits.max_model_len=100"])
    graph_io = inputs.program.graphs["model"]
    blocks = pool_blocks(graph_io, target.limits, 10 << 30, 64 * 2560)
    assert blocks == 3 * 2 + 1, "full sequences need no more"
    decode = axis_bounds(target.profiles["decode"], target.limits, pool_blocks=blocks)
    assert decode["B"] == (1, 3, 3)
    assert decode["Q"] == (1, 1, 6)
    assert decode["MB"] == (1, 2, 2)
    assert decode["NS"] == (64, 7 * 64, 7 * 64)
    prefill = axis_bounds(target.profiles["prefill"], target.limits, pool_blocks=blocks)
    assert prefill["Q"][2] == 100
    for bounds in (*decode.values(), *prefill.values()):
        assert list(bounds) == sorted(bounds)


def test_a_pool_is_no_larger_than_a_tensor_can_count(inputs: Inputs) -> None:
    target = load_target("rtx4090", ["limits.max_batch_size=2048", "limits.max_num_batched_tokens=2048"])
    graph_io = inputs.program.graphs["model"]
    blocks = pool_blocks(graph_io, target.limits, 1 << 50, 1)
    widest = max(int(spec.shape[1]) for spec in graph_io.with_role("cache"))
    assert blocks * 64 * widest < 2**31


def test_profiles_span_whatever_limits_are_asked() -> None:
    """A larger limit than a target's profiles would be a step that no profile takes."""
    target = load_target("rtx4090")
    asked = target.limits.model_copy(update={"max_batch_size": 48, "max_num_batched_tokens": 8192})
    found = spanning(target.profiles, asked)
    assert (found["decode"].max_batch_size, found["decode"].max_query_len) == (48, 6)
    assert (found["prefill"].max_batch_size, found["prefill"].max_query_len) == (1, 8192)
    assert axis_bounds(found["decode"], asked, pool_blocks=99)["B"][2] == 48
    assert axis_bounds(found["prefill"], asked, pool_blocks=99)["Q"][2] == 8192
    assert spanning(target.profiles, target.limits) == target.profiles
    short = asked.model_copy(update={"max_model_len": 512})
    assert axis_bounds(spanning(target.profiles, short)["prefill"], short, pool_blocks=99)["Q"][2] == 512


@pytest.mark.parametrize(
    ("limits", "prefill", "short_prefill"),
    [
        ({}, (4, 2048), (4, 512)),
        ({"max_num_batched_tokens": 512}, (4, 512), (4, 128)),
        ({"max_num_batched_tokens": 8192}, (4, 8192), (4, 512)),
        ({"max_model_len": 100}, (4, 100), (4, 100)),
        ({"max_batch_size": 2, "max_num_batched_tokens": 3}, (2, 3), (2, 1)),
    ],
)
def test_no_prefill_profile_is_larger_than_a_step(
    limits: dict[str, int], prefill: tuple[int, int], short_prefill: tuple[int, int]
) -> None:
    """A plan reserves memory for the corner of each profile, so of a profile that a user wrote too wide is cut."""
    target = load_target("rtx4090", ["profiles.prefill.max_batch_size=4"])
    asked = target.limits.model_copy(update=limits)
    found = spanning(target.profiles, asked)
    most = asked.max_num_batched_tokens
    fewer = (max(1, min(prefill[0], most // prefill[1])), prefill[1])
    assert largest_step(found["prefill"], asked) == fewer
    assert largest_step(found["short_prefill"], asked) == short_prefill
    assert largest_step(found["decode"], asked)[0] == asked.max_batch_size, "steps are padded to it"
    for name in ("prefill", "short_prefill"):
        assert math.prod(largest_step(found[name], asked)) <= most


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch_size": 2048, "max_num_batched_tokens": 2048}, {"max_model_len": 128}]
)
@pytest.mark.parametrize("name", [target.name for target in all_targets() if target.gpu])
def test_expected_memory_covers_the_largest_step_of_each_profile(
    inputs: Inputs, name: str, limits: dict[str, int]
) -> None:
    target = load_target(name, [f"limits.{key}={value}" for key, value in limits.items()])
    found = expected_bytes(inputs, target, target.limits, 1)
    bounds = [
        axis_bounds(one, target.limits, pool_blocks=99) for one in spanning(target.profiles, target.limits).values()
    ]
    corners = [(one["B"][2], one["Q"][2]) for one in bounds]
    if not limits:
        assert max(b * q for b, q in corners) == target.limits.max_num_batched_tokens, "and no more than a step has"
    for batch, queries in corners:
        one = Workload(target.limits.max_model_len, batch, 1, queries - 1)
        assert found["scratch"] >= scratch_bytes(inputs.config, Parallelism(), one, target.kv_format)
        logits = batch * (queries - 1) * inputs.config.vocab_size * 4 * 2  # a step that samples needs one row of each
        assert found["activations"] >= activation_bytes(inputs.config, Parallelism(), one) - logits


@pytest.mark.parametrize("name", [target.name for target in all_targets() if target.gpu])
def test_a_target_takes_short_prompts_together_and_the_longest_alone(name: str) -> None:
    target = load_target(name)
    assert spanning(target.profiles, target.limits) == target.profiles, "nothing is cut"
    corners = {key: largest_step(profile, target.limits) for key, profile in target.profiles.items()}
    assert corners["prefill"] == (1, target.limits.max_num_batched_tokens)
    assert corners["short_prefill"] == (4, target.limits.max_num_batched_tokens // 4)
