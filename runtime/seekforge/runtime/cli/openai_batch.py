"""Lines of OpenAI's batch files: what they ask for in our words, and our results in theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.engine.outputs import CompletionOutput, RequestOutput
from seekforge.runtime.openai.answers import chat_logprobs, completion_logprobs, finish_reason
from seekforge.runtime.openai.params import chat_fields, chat_options, completion_fields
from seekforge.runtime.openai.protocol import BodyError, ChatCompletionBody, CompletionBody, read_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LINE: Final = frozenset(("custom_id", "method", "url", "body"))
#: Keys that the server takes and a file has no use for; they change nothing about the text.
_IGNORED: Final = frozenset(("stream_options",))
#: Keys that a batch does not do.
_NOT_HERE: Final = ("stream", "echo", "priority", "return_token_ids", "include_reasoning")


@dataclass(frozen=True)
class BatchLine:
    """What one line asks for.

    Attributes:
        custom_id: whose it is.
        url: the address that it would have been sent to.
        prompt: the prompt of a completion; None for a chat.
        messages: the messages of a chat; None for a completion.
        options: what else a chat comes with: tools and the like (`ChatOptions`).
        params: sampling parameters that the body gives, by field.
        model: what the body calls the model.
    """

    custom_id: str
    url: str
    prompt: Any
    messages: Any
    options: dict[str, Any]
    params: dict[str, Any]
    model: str


def is_batch_line(raw: Mapping[str, Any]) -> bool:
    """Whether an object is a line of such a file."""
    return "custom_id" in raw or "body" in raw


def read_line(raw: Mapping[str, Any]) -> BatchLine:
    """Read one line.

    Raises:
        RequestError: a key is missing, unknown, or asks for what is not done here.
    """
    unknown = sorted(raw.keys() - _LINE)
    if unknown:
        raise RequestError(f"unknown key {unknown[0]!r}, expected {', '.join(sorted(_LINE))}")
    custom_id, url, body = raw.get("custom_id"), raw.get("url"), raw.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"custom_id is {custom_id!r}, expected text")
    if raw.get("method", "POST") != "POST":
        raise RequestError(f"method is {raw['method']!r}, expected 'POST'")
    if url not in (CHAT, COMPLETIONS):
        raise RequestError(f"url is {url!r}, expected {CHAT!r} or {COMPLETIONS!r}")
    if not isinstance(body, dict):
        raise RequestError(f"body is {type(body).__name__}, expected an object")
    said = {name: value for name, value in body.items() if name not in _IGNORED}
    for name in _NOT_HERE:
        if said.get(name):
            raise RequestError(f"body.{name} is {said[name]!r}, which a batch cannot do; leave it out")
    try:
        if url == CHAT:
            chat = read_body(ChatCompletionBody, said)
            fields, options = chat_fields(chat), chat_options(chat)
            return BatchLine(custom_id, url, None, chat.messages, options, fields, chat.model or "")
        completion = read_body(CompletionBody, said)
        return BatchLine(
            custom_id, url, completion.prompt, None, {}, completion_fields(completion), completion.model or ""
        )
    except BodyError as error:
        raise RequestError(f"body.{error}" if error.param else f"body: {error}") from None


def answer_line(
    batch_line: BatchLine, digest: str, output: RequestOutput, token_bytes: Callable[[int], bytes]
) -> dict[str, Any]:
    """Return the line of a result.

    Args:
        batch_line: the line that it answers.
        digest: the digest of the request; `id` carries it.
        output: the result.
        token_bytes: what a token is.
    """
    errors = [one.error for one in output.outputs if one.finish_reason == "error"]
    line: dict[str, Any] = {
        "id": request_id(digest),
        "custom_id": batch_line.custom_id,
        "response": None,
        "error": None,
    }
    if errors:
        return line | {"error": {"code": "server_error", "message": errors[0]}}
    chat = batch_line.url == CHAT
    choices = [_choice(one, token_bytes) for one in output.outputs]
    usage = output.usage
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": batch_line.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
    }
    return line | {"response": {"status_code": 200, "request_id": digest, "body": body}}


def request_id(digest: str) -> str:
    """Return the `id` of the line that answers the request of this digest."""
    return f"batch_req_{digest}"


def _choice(one: CompletionOutput, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": one.index,
        "finish_reason": finish_reason(one.finish_reason),
        "logprobs": None,
    }
    rows = [(entry.token_id, entry.logprob, entry.rank, entry.top) for entry in one.logprobs or ()]
    if one.message is not None:
        choice["message"] = one.message.to_dict()
        if one.message.tool_calls and one.finish_reason == "stop":
            choice["finish_reason"] = "tool_calls"
        if one.logprobs is not None:
            choice["logprobs"] = chat_logprobs(rows, token_bytes)
        return choice
    choice["text"] = one.text
    if one.logprobs is not None:
        choice["logprobs"] = completion_logprobs(rows, one.token_ids, token_bytes)
    return choice
