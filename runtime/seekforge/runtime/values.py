"""Checks of values that come from outside, and of the names they come under. Each gives the plain value or refuses.

NumPy's numbers count as Python's; NumPy itself is not imported.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import MISSING, fields
from typing import Any, SupportsIndex, TypeVar

from seekforge.common.errors import RequestError

_T = TypeVar("_T")

#: Names that other servers have, or other versions of vLLM -> what to use here.
OTHER_NAMES: dict[str, dict[str, str]] = {
    "SamplingParams": {
        "guided": "structured_outputs=StructuredOutputsParams(...)",
        "guided_decoding": "structured_outputs=StructuredOutputsParams(...)",
        "guided_json": "structured_outputs=StructuredOutputsParams(json=...)",
        "guided_regex": "structured_outputs=StructuredOutputsParams(regex=...)",
        "guided_choice": "structured_outputs=StructuredOutputsParams(choice=...)",
        "guided_grammar": "structured_outputs=StructuredOutputsParams(grammar=...)",
        "response_format": "structured_outputs=StructuredOutputsParams(json=...)",
        "include_stop": "include_stop_str_in_output",
        "max_new_tokens": "max_tokens",
        "max_completion_tokens": "max_tokens",
        "stop_strings": "stop",
        "do_sample": "temperature=0 for the most likely token",
        "use_beam_search": "best_of, which samples",
        "output_kind": "LLM.stream for deltas, LLM.generate for the whole",
        "stream_interval": "LLM.stream, which gives every step",
        "flat_logprobs": "logprobs, whose entries are flat already",
        "logits_processors": "logit_bias, bad_words, allowed_token_ids or structured_outputs",
        "extra_args": "the parameters by their names",
        "thinking_budget": "thinking_token_budget",
        "repetition_detection": "repetition_penalty, frequency_penalty or presence_penalty",
        "logprob_token_ids": "logprobs=-1 and the ids of interest",
        "prompt_logprob_token_ids": "prompt_logprobs=-1 and the ids of interest",
        "prompt_logprob_start": "prompt_logprobs and the positions of interest",
        "routed_experts_prompt_start": "taps=['expert_ids'] and the positions of interest",
        "trace_decode_token_ids": "prompt_logprobs of the prompt and those tokens",
        "skip_clone": "nothing: parameters are frozen and never copied",
        "output_text_buffer_length": "nothing: only what may begin a stop string is held back",
    },
    "StructuredOutputsParams": {
        "json_schema": "json",
        "whitespace": "disable_any_whitespace",
        "disable_fallback": "nothing: there is one backend",
        "structural_tag": "grammar",
    },
}


def none_is_unset(instance: object) -> None:
    """Give every field that is None its default; so None means "not set" everywhere."""
    for one in fields(instance):  # pyright: ignore[reportArgumentType]
        if getattr(instance, one.name) is None and one.default is not None:
            default = one.default if one.default is not MISSING else one.default_factory()  # pyright: ignore
            object.__setattr__(instance, one.name, default)


def names_checked(cls: type[_T]) -> type[_T]:
    """Let the constructor refuse unknown names with the one to use, as a `RequestError`."""
    plain: Callable[..., None] = cls.__init__
    known = [one.name for one in fields(cls)]  # pyright: ignore[reportArgumentType]
    advice = OTHER_NAMES.get(cls.__name__, {})

    @functools.wraps(plain)
    def checked(self: _T, **values: Any) -> None:
        for name in values:
            if name not in known:
                use = f"use {advice[name]}" if name in advice else f"expected some of {', '.join(known)}"
                raise RequestError(f"{cls.__name__} has no {shown(name)}; {use}")
        plain(self, **values)

    cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def shown(value: object) -> str:
    """Return a value as a message shows it: shortened, on one line."""
    try:
        text = repr(value)
    except Exception as error:  # a foreign object may do anything
        text = f"{type(value).__name__} whose repr raises {type(error).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:80]}…"


def number(name: str, value: Any, expected: str, valid: Callable[[float], bool]) -> float:
    kind = getattr(getattr(value, "dtype", None), "kind", "")  # NumPy's, which this module need not import
    scalar = isinstance(value, (int, float)) or (kind in "iuf" and kind != "" and getattr(value, "ndim", 1) == 0)
    if scalar and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and valid(number):
            return number
    raise RequestError(f"{name} is {shown(value)}, expected {expected}")


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    if is_integer(value):
        number = operator.index(value)
        if number >= least and (most is None or number <= most):
            return number
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    raise RequestError(f"{name} is {shown(value)}, expected {expected}")


def is_integer(value: object) -> bool:
    """Whether `value` is a Python or NumPy integer; a boolean or 1.0 is none."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or getattr(value, "ndim", 0) != 0:
        return False
    return getattr(getattr(value, "dtype", None), "kind", "i") in "iu"


def boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
        return bool(value)
    raise RequestError(f"{name} is {shown(value)}, expected true or false")


def listed(value: Any) -> list[Any] | None:
    """Return the entries of a list, tuple, set or array with one axis; None of anything else."""
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes, bytearray)):
        return list(value)
    return list(value) if getattr(value, "ndim", 0) == 1 else None


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds {shown(value)}, which is not valid Unicode") from None
    return value


def strings(name: str, value: Any, most: int | None = None) -> tuple[str, ...]:
    """Return texts, each once; `most` characters in all."""
    items = listed(value)
    if items is None or not all(isinstance(text, str) and text for text in items):
        raise RequestError(f"{name} is {shown(value)}, expected a list of texts, none empty")
    size = sum(map(len, items))
    if most is not None and size > most:
        raise RequestError(f"{name} has {size:,} characters in all, expected at most {most:,}")
    return tuple(dict.fromkeys(str(text(name, one)) for one in items))


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    items = listed(value)
    if items is None:
        raise RequestError(f"{name} is {shown(value)}, expected a list of token ids")
    return tuple(dict.fromkeys(integer(name, token, 0) for token in items))
