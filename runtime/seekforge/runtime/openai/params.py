"""From a body to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.openai.protocol import BodyError, ChatCompletionBody, CompletionBody, GenerationBody
from seekforge.runtime.sampling.params import SamplingParams

_FIELDS: Final = frozenset(field.name for field in fields(SamplingParams))
#: Fields of bodies that have the name of a sampling parameter and another meaning.
_OTHER: Final = frozenset(("logprobs", "structured_outputs"))


def completion_params(body: CompletionBody, defaults: SamplingParams) -> SamplingParams:
    """Return the sampling parameters of a completion.

    Args:
        body: the body of the request.
        defaults: what the checkpoint recommends, for what the body does not say.

    Raises:
        BodyError: a value is wrong.
    """
    said = _said(body)
    if body.max_tokens == 0 and body.echo:
        said["max_tokens"] = 1  # the prompt is what is wanted: what is generated is dropped
    if body.logprobs is not None:
        said["logprobs"] = body.logprobs
        if body.echo:
            said.setdefault("prompt_logprobs", body.logprobs)
    return _made(said, defaults, {"max_tokens": 16})


def chat_params(body: ChatCompletionBody, defaults: SamplingParams) -> SamplingParams:
    """Return the sampling parameters of a chat, which may use the rest of its context where it says no more.

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
    return _made(said, defaults, {"max_tokens": None})


def _said(body: GenerationBody) -> dict[str, Any]:
    said = {
        name: value
        for name in body.model_fields
        if name in _FIELDS and name not in _OTHER and (value := getattr(body, name)) is not None
    }
    chat = isinstance(body, ChatCompletionBody)  # whose format is told to the model as well (`ChatOptions`)
    form = None if chat else structured_outputs(body.response_format)
    if body.structured_outputs is not None:
        if form is not None:
            raise BodyError("response_format and structured_outputs are both there; leave one out", "response_format")
        form = body.structured_outputs
    if form is not None:
        said["structured_outputs"] = form
    return said


def _made(said: dict[str, Any], defaults: SamplingParams, others: Mapping[str, Any]) -> SamplingParams:
    try:
        # the limits of a completion are the interface's; what the checkpoint recommends is how to choose a token
        return replace(defaults, **{**others, **said})
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
