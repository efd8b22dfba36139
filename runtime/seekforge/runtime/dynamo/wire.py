"""What Dynamo's requests ask of an engine, and what an engine gives in Dynamo's chunks: plain values both.

A request has tokens: the frontend makes them of text, and text of the tokens that it gets. Stop strings are looked for
by both; the engine's search only spares steps.

Source: ai-dynamo/dynamo, lib/llm/src/protocols/common.rs (`SamplingOptions`, `StopConditions`) and
components/src/dynamo/common/backend/engine.py (`GenerateRequest`, `GenerateChunk`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.openai.answers import TokenRow, written_logprob
from seekforge.runtime.sampling.params import SamplingParams, StructuredOutputsParams
from seekforge.runtime.server.channel import Piece

#: Keys that have the names of `SamplingParams`, by the part of a request that has them.
_SAME_NAMES: Final = {
    "sampling_options": (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "include_stop_str_in_output",
        "allowed_token_ids",
    ),
    "stop_conditions": ("min_tokens", "stop", "ignore_eos"),
    "output_options": ("logprobs", "prompt_logprobs", "skip_special_tokens"),
}
_FORMS: Final = ("json", "regex", "choice", "grammar", "whitespace_pattern")
#: What only other engines do: part of a request, key, and what asks for it.
_NOT_DONE: Final = (
    ("sampling_options", "use_beam_search", "beam search"),
    ("sampling_options", "bad_words_token_ids", "bad words by their tokens"),
)
#: Keys of a request that come from a deployment of other kinds of workers.
_OTHER_WORKERS: Final = ("prefill_result", "bootstrap_info", "encoder_result", "multi_modal_data")
#: Why a completion ended -> Dynamo's word.
_REASONS: Final = {"stop": "stop", "length": "length", "timeout": "length", "abort": "cancelled", "error": "error"}


def params_of(request: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """Return what a request asks for.

    Args:
        request: a `GenerateRequest`.
        defaults: what the checkpoint recommends, for what the request leaves open.

    Raises:
        RequestError: it asks for what this engine does not do, or for what cannot be.
    """
    for key in _OTHER_WORKERS:
        if request.get(key):
            raise RequestError(f"the request has {key}, which this worker does not take; send it to one of text alone")
    for part, key, what in _NOT_DONE:
        if _part(request, part).get(key):
            raise RequestError(f"{part}.{key} asks for {what}, which this engine does not do; leave it out")
    said: dict[str, Any] = {"max_tokens": None}
    for part, names in _SAME_NAMES.items():
        values = _part(request, part)
        said |= {name: values[name] for name in names if values.get(name) is not None}
    stops = _part(request, "stop_conditions")
    said["max_tokens"] = stops.get("max_tokens")
    hidden = () if said.get("ignore_eos") else stops.get("stop_token_ids_hidden") or ()
    ends = dict.fromkeys([*(stops.get("stop_token_ids") or ()), *hidden])
    said["stop_token_ids"] = tuple(ends)
    if stops.get("max_thinking_tokens") is not None:
        said["thinking_token_budget"] = stops["max_thinking_tokens"]
    for name in ("n", "best_of"):  # the frontend makes text of all tokens that come for a request as if of one
        count = _part(request, "sampling_options").get(name)
        if count not in (None, 1):
            raise RequestError(f"{name} is {count!r}, and a worker gives one completion; ask as often instead")
    guided = _part(request, "sampling_options").get("guided_decoding")
    if guided:
        said["structured_outputs"] = _form(guided)
    return replace(defaults, **said)


def chunk_of(piece: Piece, token_text: Callable[[int], str]) -> dict[str, Any]:
    """Return a `GenerateChunk` with what a completion gained.

    Args:
        piece: what it gained; its `end`, where it has one, gives the counts of the request.
        token_text: returns the text of a token, for log-probabilities.
    """
    chunk: dict[str, Any] = {"token_ids": list(piece.token_ids), "index": piece.choice}
    if piece.logprobs:
        chunk["log_probs"] = [written_logprob(logprob) for _, logprob, _, _ in piece.logprobs]
        chunk["top_logprobs"] = [_likeliest(row, token_text) for row in piece.logprobs]
    if piece.finish_reason is not None:
        chunk["finish_reason"] = _REASONS[piece.finish_reason]
    if piece.end is not None:
        prompt, completion = piece.end.num_prompt_tokens, piece.end.num_completion_tokens
        chunk["completion_usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": piece.end.num_cached_tokens},
        }
        if piece.end.prompt_logprobs is not None:
            rows = [None if row is None else _prompt_entry(row, token_text) for row in piece.end.prompt_logprobs]
            chunk["engine_data"] = {"prompt_logprobs": rows}
    return chunk


def _part(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name) or {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} of the request is a {type(value).__name__}, expected an object")
    return value


def _form(guided: Mapping[str, Any]) -> StructuredOutputsParams:
    if guided.get("structural_tag") is not None:
        raise RequestError("guided_decoding.structural_tag is not known to this engine; use json, regex or grammar")
    return StructuredOutputsParams(**{name: guided[name] for name in _FORMS if guided.get(name) is not None})


def _likeliest(row: TokenRow, token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the likeliest tokens of a place, the chosen one among them, as the ranks fall."""
    token, logprob, rank, top = row
    ranked = {one: (place, value) for place, (one, value) in enumerate(top, 1)}
    ranked.setdefault(token, (rank, logprob))
    return [
        {"rank": place, "token_id": one, "token": token_text(one), "logprob": written_logprob(value)}
        for one, (place, value) in ranked.items()
    ]


def _prompt_entry(row: TokenRow, token_text: Callable[[int], str]) -> dict[str, dict[str, Any]]:
    """Return the entry of a token of the prompt: token ids as text, as keys of JSON are."""
    return {
        str(one["token_id"]): {"rank": one["rank"], "decoded_token": one["token"], "logprob": one["logprob"]}
        for one in _likeliest(row, token_text)
    }
