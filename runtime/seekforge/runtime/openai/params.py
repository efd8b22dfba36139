"""From a body to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.openai.protocol import BodyError, ChatCompletionBody, CompletionBody, GenerationBody
from seekforge.runtime.sampling.params import SamplingParams

_FIELDS: Final = frozenset(field.name for field in fields(SamplingParams))
#: Of bodies the field that has the name of a sampling parameter and another meaning.
_OTHER: Final = "logprobs"


def completion_params(body: CompletionBody, defaults: SamplingParams) -> SamplingParams:
    """Return the sampling parameters of a completion.

    Args:
        body: the body of the request.
        defaults: what the checkpoint recommends, for what the body does not say.

    Raises:
        BodyError: a value is wrong.
    """
    return _made({"max_tokens": 16, **completion_fields(body)}, defaults)


def completion_fields(body: CompletionBody) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that a body says.

    Raises:
        BodyError: a value is wrong.
    """
    said = _said(body)
    form = structured_outputs(body.response_format)
    if form is not None:
        if "structured_outputs" in said:
            raise BodyError("response_format and structured_outputs are both there; leave one out", "response_format")
        said["structured_outputs"] = form
    if body.max_tokens == 0 and body.echo:
        said["max_tokens"] = 1  # the prompt is what is wanted: what is generated is dropped
    if body.logprobs is not None:
        said["logprobs"] = body.logprobs
        if body.echo:
            said.setdefault("prompt_logprobs", body.logprobs)
    return said


def chat_params(body: ChatCompletionBody, defaults: SamplingParams) -> SamplingParams:
    """Return the sampling parameters of a chat, which may use the rest of its context where it says no more.

    Raises:
        BodyError: a value is wrong.
    """
    return _made({"max_tokens": None, **chat_fields(body)}, defaults)


def chat_fields(body: ChatCompletionBody) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that a body says; its `response_format` is among the `chat_options`.

    Raises:
        BodyError: a value is wrong.
    """
    said = _said(body)
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise BodyError("max_tokens and max_completion_tokens differ; leave max_tokens out", "max_tokens")
        said["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        said["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise BodyError("top_logprobs needs logprobs to be true", "top_logprobs")
    return said


def chat_options(body: ChatCompletionBody) -> dict[str, Any]:
    """Return the options of the conversation (`ChatOptions`) that a body says.

    Raises:
        BodyError: two of them contradict each other.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        thinking = body.reasoning_effort != "none"
        if kwargs.get("thinking", thinking) != thinking:
            raise BodyError(
                f"reasoning_effort {body.reasoning_effort!r} and chat_template_kwargs.thinking contradict each other",
                "reasoning_effort",
            )
        kwargs["thinking"] = thinking
    said = {
        "tools": body.tools,
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": body.response_format,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "chat_template_kwargs": kwargs or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _said(body: GenerationBody) -> dict[str, Any]:
    return {
        name: value
        for name in body.model_fields
        if name in _FIELDS and name != _OTHER and (value := getattr(body, name)) is not None
    }


def _made(said: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    try:
        return replace(defaults, **said)
    except RequestError as error:
        name = str(error).partition(" ")[0]
        raise BodyError(str(error), name if name in _FIELDS else "") from None


def structured_outputs(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the structured outputs that a `response_format` asks for; None for text.

    Raises:
        BodyError: it is none that is known.
    """
    if form is None:
        return None
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        inner = form.get("json_schema", form)
        if isinstance(inner, Mapping) and isinstance(inner.get("schema"), (dict, bool)):
            return {"json": inner["schema"]}
        raise BodyError('response_format "json_schema" has no json_schema.schema', "response_format.json_schema")
    raise BodyError(
        f"response_format.type is {kind!r}, expected 'text', 'json_object' or 'json_schema'", "response_format.type"
    )
