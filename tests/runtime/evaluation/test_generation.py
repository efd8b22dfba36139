from __future__ import annotations

from typing import Any

import pytest

from seekforge.common.errors import RequestError
from seekforge.runtime.evaluation.generation import cut, generation_params

TASK: dict[str, Any] = {"until": ["\n", ""], "max_gen_toks": 32, "do_sample": False}


def test_a_task_that_says_nothing_of_sampling_is_greedy() -> None:
    params, until = generation_params(TASK, {})
    assert params.greedy and params.max_tokens == 32
    assert until == ("\n",) == tuple(params.stop)


def test_a_task_may_sample_and_options_go_before_it() -> None:
    task = TASK | {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    params, _ = generation_params(task, {})
    assert (params.temperature, params.top_p) == (0.7, 0.9)
    params, _ = generation_params(task, {"temperature": 1.0, "max_tokens": 8})
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 0.9, 8)


@pytest.mark.parametrize(
    ("sampling", "max_tokens"),
    [
        ({"thinking_token_budget": 100}, 132),
        ({}, None),
        ({"thinking_token_budget": -1}, None),
        ({"thinking_token_budget": 100, "max_tokens": 50}, 50),
    ],
)
def test_a_thought_has_tokens_of_its_own_and_no_text_ends_it(sampling: dict[str, Any], max_tokens: int | None) -> None:
    params, until = generation_params(TASK, sampling, thinking=True)
    assert params.max_tokens == max_tokens and params.stop == () and until == ("\n",)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"penalty_alpha": 0.6}, "penalty_alpha"), ({"num_beams": 4}, "beam search"), ({"top_p": 7}, "top_p")],
)
def test_what_is_not_done_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        generation_params(TASK | more, {})


@pytest.mark.parametrize(
    ("text", "until", "before"),
    [("a\nb", ("\n",), "a"), ("ab", ("\n",), "ab"), ("a;b\nc", ("\n", ";"), "a"), ("", ("x",), ""), ("x", (), "x")],
)
def test_an_answer_is_cut_at_what_comes_first(text: str, until: tuple[str, ...], before: str) -> None:
    assert cut(text, until) == before
