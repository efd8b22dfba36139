"""Rollouts: groups that can be sampled again one by one, versions of weights, and what became too old."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.rollout import RolloutEngine

PARAMS = SamplingParams(n=3, temperature=1.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9, 8]]


@pytest.fixture
def llm(toy_engine: Path, monkeypatch: pytest.MonkeyPatch):
    with LLM(toy_engine, threads=1, num_blocks=20, self_check=False) as llm:
        # the toy engine has no bindings: what an update does around the backend is looked at here
        monkeypatch.setattr(llm._core.backend, "update_weights", lambda tensors: None)
        yield llm


def test_each_rollout_is_sampled_again_alone_by_its_seed(llm: LLM) -> None:
    engine = RolloutEngine(llm, record=["topk_indices"])
    groups = engine.generate(PROMPTS, PARAMS, seed=4)
    assert [len(group) for group in groups] == [3, 3] and engine.num_sampled == 6
    assert len({one.token_ids for group in groups for one in group}) == 6
    for number, group in enumerate(groups):
        for one in group:
            alone = llm.generate(PROMPTS[number], replace(PARAMS, n=1, seed=one.seed, logprobs=0))[0].outputs[0]
            assert one.token_ids == alone.token_ids and one.group == number
            assert alone.logprobs is not None
            assert one.logprobs.tolist() == pytest.approx([entry.logprob for entry in alone.logprobs])
            assert one.expert_ids is None and one.topk_indices is not None
            assert one.topk_indices.shape == (1, len(PROMPTS[number]) + 6 - 1, 1)
    again, other = engine.generate(PROMPTS, PARAMS, seed=4), engine.generate(PROMPTS, PARAMS, seed=5)
    assert again[1][2].token_ids == groups[1][2].token_ids != other[1][2].token_ids
    with pytest.raises(RequestError, match="best_of"):
        engine.generate(PROMPTS, replace(PARAMS, best_of=4))


Call = Callable[[LLM, Any], object]
ODD: dict[str, tuple[Call, list[Any]]] = {
    "engine": (lambda llm, odd: RolloutEngine(odd), [None, "engine", Path(), object()]),
    "record": (
        lambda llm, odd: RolloutEngine(llm, record=odd),
        [5, "expert_ids", ["x"], [["expert_ids"]], [None], b"x", {"expert_ids": 1}, {"expert_ids"}],
    ),
    "staleness": (
        lambda llm, odd: RolloutEngine(llm, max_staleness=odd),
        ["1", 1.5, -1, float("nan"), True, [1]],
    ),
    "prompts": (lambda llm, odd: RolloutEngine(llm).generate(odd, PARAMS), [None, 1.5, {}, object(), [[-1]], "\ud800"]),
    "params": (lambda llm, odd: RolloutEngine(llm).generate(PROMPTS, odd), [None, {}, "greedy", [PARAMS]]),
    "seed": (
        lambda llm, odd: RolloutEngine(llm).generate(PROMPTS, PARAMS, seed=odd),
        ["1", 1.5, -1, float("nan"), True, [1]],
    ),
    "tensors": (
        lambda llm, odd: RolloutEngine(llm).update_weights(odd),
        [None, [], {1: np.zeros(1)}, {"a": [1.0]}, {"x" * 1_000_000: 1}],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_argument_is_refused_at_the_door(llm: LLM, name: str) -> None:
    call, values = ODD[name]
    for odd in values:
        with pytest.raises((RequestError, EngineError)) as told:
            call(llm, odd)
        assert "\n" not in str(told.value) and len(str(told.value)) < 400, odd
    assert llm.metrics().num_running == 0 and llm.weight_version == 0


def test_a_seed_may_be_as_large_as_it_likes(llm: LLM) -> None:
    assert RolloutEngine(llm, record=[]).generate(PROMPTS[0], PARAMS, seed=10**400)


def test_what_is_too_old_is_counted_and_left_out(llm: LLM) -> None:
    engine = RolloutEngine(llm, max_staleness=1, record=[])
    ((first, *_),) = engine.generate(PROMPTS[0], PARAMS)
    assert engine.update_weights({}) == 1
    ((second, *_),) = engine.generate(PROMPTS[0], PARAMS)
    assert (first.weight_version, second.weight_version) == (0, 1)
    assert engine.fresh([first, second]) == [first, second] and engine.num_stale == 0
    engine.update_weights({})
    assert [engine.staleness(one) for one in (first, second)] == [2, 1]
    assert engine.fresh([first, second]) == [second] and engine.num_stale == 1


def test_a_completion_says_where_newer_weights_took_over(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], replace(PARAMS, n=1))
    deltas = [next(stream), next(stream)]
    assert llm.update_weights({}) == 1 and llm.weight_version == 1
    deltas.append(next(stream))
    llm.update_weights({}, max_staleness=2)
    deltas += stream
    output = deltas[-1].output
    assert output is not None
    (one,) = output.outputs
    assert one.weight_version == 0 and one.weight_changes == (2, 3) and one.finish_reason == "length"
    assert llm.generate([5, 6], replace(PARAMS, n=1))[0].outputs[0].weight_version == 2


def test_an_update_ends_completions_that_would_be_too_old(llm: LLM) -> None:
    old, new = llm.stream([5, 6, 7], replace(PARAMS, n=1)), llm.stream([5, 6, 8], replace(PARAMS, n=1))
    next(old)
    llm.update_weights({}, max_staleness=1)
    llm.update_weights({}, max_staleness=1)
    ended = list(old)[-1].output
    assert ended is not None and ended.outputs[0].finish_reason == "abort"
    assert 1 <= len(ended.outputs[0].token_ids) < 6
    through = list(new)[-1].output
    assert through is not None and through.outputs[0].finish_reason == "length"
    assert through.outputs[0].weight_version == 2 and through.outputs[0].weight_changes == ()
    assert llm.metrics().num_running == 0 and np.isfinite(llm.metrics().step_s)
