"""Dynamo's requests and chunks: every key that means something is taken or refused."""

from __future__ import annotations

from typing import Any

import pytest

from seekforge.common.errors import RequestError
from seekforge.runtime.dynamo.wire import chunk_of, params_of
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.channel import End, Piece

DEFAULTS = SamplingParams(temperature=0.6, top_p=0.95)


def request(**parts: Any) -> dict[str, Any]:
    return {"token_ids": [1, 2], **parts}


def test_what_is_left_open_is_the_checkpoints() -> None:
    assert params_of(request(), DEFAULTS) == SamplingParams(temperature=0.6, top_p=0.95, max_tokens=None)
    blank = {"sampling_options": {"temperature": None}, "stop_conditions": None, "output_options": {}}
    assert params_of(request(**blank), DEFAULTS).temperature == 0.6


def test_what_is_said_is_taken() -> None:
    params = params_of(
        request(
            sampling_options={"n": 1, "temperature": 0.0, "top_k": -1, "seed": 7, "guided_decoding": {"regex": "a+"}},
            stop_conditions={"max_tokens": 9, "stop": ["x"], "stop_token_ids": [4], "stop_token_ids_hidden": [4, 5]},
            output_options={"logprobs": 3, "skip_special_tokens": False},
        ),
        DEFAULTS,
    )
    assert (params.n, params.temperature, params.top_k, params.seed, params.max_tokens) == (1, 0.0, 0, 7, 9)
    assert (params.stop, params.stop_token_ids, params.logprobs) == (("x",), (4, 5), 3)
    assert params.structured_outputs is not None and params.structured_outputs.regex == "a+"
    assert not params.skip_special_tokens


def test_an_end_that_is_to_be_ignored_ends_nothing() -> None:
    stops = {"ignore_eos": True, "stop_token_ids_hidden": [1], "max_thinking_tokens": 3}
    params = params_of(request(stop_conditions=stops), DEFAULTS)
    assert params.ignore_eos and params.stop_token_ids == () and params.thinking_token_budget == 3


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"sampling_options": {"use_beam_search": True}}, "beam search"),
        ({"sampling_options": {"bad_words_token_ids": [[1]]}}, "bad words"),
        ({"sampling_options": {"n": 1, "best_of": 3}}, "best_of is 3"),
        ({"sampling_options": {"n": 2}}, "n is 2"),
        ({"sampling_options": {"guided_decoding": {"structural_tag": {}}}}, "structural_tag"),
        ({"sampling_options": {"guided_decoding": {"json": {}, "regex": "a"}}}, "exactly one"),
        ({"sampling_options": {"temperature": -1}}, "temperature"),
        ({"sampling_options": "hot"}, "expected an object"),
        ({"prefill_result": {"a": 1}}, "prefill_result"),
        ({"multi_modal_data": {"image": []}}, "multi_modal_data"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens"),
    ],
)
def test_what_is_not_done_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        params_of(request(**parts), DEFAULTS)


def test_a_chunk_has_tokens_and_the_last_one_the_counts() -> None:
    assert chunk_of(Piece(0, 1, "ab", (5, 6)), str) == {"token_ids": [5, 6], "index": 1}
    last = chunk_of(Piece(0, 0, "", (7,), "length", end=End((), 3, 9, 2)), str)
    assert last["finish_reason"] == "length"
    assert last["completion_usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 9,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_log_probabilities_name_the_chosen_token_among_the_likeliest() -> None:
    row = (7, -3.0, 5, ((1, -0.5), (2, float("-inf"))))
    chunk = chunk_of(Piece(0, 0, "", (7,), logprobs=(row,)), lambda token: f"<{token}>")
    assert chunk["log_probs"] == [-3.0]
    (place,) = chunk["top_logprobs"]
    assert [(one["rank"], one["token_id"], one["token"]) for one in place] == [
        (1, 1, "<1>"),
        (2, 2, "<2>"),
        (5, 7, "<7>"),
    ]
    assert place[1]["logprob"] == -9999.0
    chosen = chunk_of(Piece(0, 0, "", (1,), logprobs=((1, -0.5, 1, ((1, -0.5),)),)), str)["top_logprobs"][0]
    assert len(chosen) == 1


def test_log_probabilities_of_the_prompt_are_keyed_by_tokens() -> None:
    end = End((1, 2), 2, 1, 0, prompt_logprobs=(None, (2, -1.0, 4, ())))
    rows = chunk_of(Piece(0, 0, "", (7,), "stop", end=end), str)["engine_data"]["prompt_logprobs"]
    assert rows == [None, {"2": {"rank": 4, "decoded_token": "2", "logprob": -1.0}}]
