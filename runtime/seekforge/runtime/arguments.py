"""What callers hand to `generate` and `chat`, read and checked: prompts, parameters, priorities and timeouts."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

from seekforge.common.errors import RequestError
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.segments import SegmentedText
from seekforge.runtime.values import integer, is_integer, listed, number, shown

#: Text, encoded as it is; token ids; one of them as a mapping with the single key "prompt" or "prompt_token_ids"; or
#: the prompt of a `ChatRequest`.
Prompt = str | SegmentedText | Sequence[int] | Mapping[str, Any]
_PROMPT = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": [...]}'
#: Levels of priority: a request is served so many levels sooner or later at most.
_MOST_PRIORITY = 1 << 31


def split_prompts(prompts: object) -> tuple[list[Any], bool]:
    """Return the prompts of one call, and whether one alone was given bare.

    Raises:
        RequestError: it is neither a prompt nor a list of them.
    """
    if isinstance(prompts, (str, Mapping, SegmentedText)):
        return [prompts], True
    batch = None if isinstance(prompts, Set) else listed(prompts)
    if batch is None:
        raise RequestError(f"the prompt is {shown(prompts)}, expected {_PROMPT}, or a list of these")
    return ([batch], True) if batch and is_integer(batch[0]) else (batch, False)


def read_prompt(prompt: object) -> str | SegmentedText | tuple[int, ...]:
    """Return the text or the token ids that a prompt gives.

    Raises:
        RequestError: it gives neither.
    """
    if isinstance(prompt, Mapping):
        keys = list(prompt)
        if keys == ["prompt"] and isinstance(prompt["prompt"], str):
            return prompt["prompt"]
        ids = listed(prompt["prompt_token_ids"]) if keys == ["prompt_token_ids"] else None
    else:
        if isinstance(prompt, (str, SegmentedText)):
            return prompt
        ids = None if isinstance(prompt, Set) else listed(prompt)
    if ids is None:
        raise RequestError(f"the prompt is {shown(prompt)}, expected {_PROMPT}")
    return tuple(map(_token_id, ids))


def read_priority(value: object) -> int:
    """Return a priority; None is 0.

    Raises:
        RequestError: it is no whole number.
    """
    return 0 if value is None else integer("priority", value, -_MOST_PRIORITY, _MOST_PRIORITY)


def read_timeout(value: object) -> float | None:
    """Return a timeout in seconds, or None for no bound.

    Raises:
        RequestError: it is no number that can be compared with a time.
    """
    if value is None:
        return None
    return number("timeout_s", value, "seconds: a finite number of at least 0, or None", lambda seconds: seconds >= 0)


def read_params(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams
) -> Sequence[SamplingParams]:
    """Return the parameters of each of `count` prompts, from one for all or one each; None takes `default`.

    Raises:
        RequestError: they are something else, or of another number.
    """
    if params is None or isinstance(params, SamplingParams):
        return [default if params is None else params] * count
    if not isinstance(params, (list, tuple)):
        raise RequestError(f"sampling_params is {shown(params)}, expected SamplingParams, or one for each prompt")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts; pass one, or one each")
    return [default if one is None else one for one in params]


def read_priorities(count: int, priority: int | Sequence[int] | None) -> Sequence[int]:
    """Return the priority of each of `count` prompts, from one for all or one each.

    Raises:
        RequestError: they are no whole numbers, or of another number.
    """
    many = None if isinstance(priority, Set) else listed(priority)  # a set has no order
    if many is None:
        return [read_priority(priority)] * count
    if len(many) != count:
        raise RequestError(f"{len(many)} priorities for {count} prompts; pass one, or one each")
    return [read_priority(one) for one in many]


def refuse_best_of(params: SamplingParams) -> None:
    """Refuse what cannot be streamed.

    Raises:
        RequestError: which completions are returned is known at the end only.
    """
    if params.best_of not in (None, params.n):
        raise RequestError("best_of cannot be streamed, since the best are known at the end only; use generate")


def _token_id(value: object) -> int:
    if not is_integer(value):
        raise RequestError(f"prompt token {shown(value)} is no token id; pass text, or a list of whole numbers")
    return operator.index(value)  # pyright: ignore[reportArgumentType]
