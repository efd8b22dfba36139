"""Lines of OpenAI's batch files: what they ask for in our words, and our results in theirs.

Source: the field names and the shape of both files are those of OpenAI's published Batch, Chat Completions and
Completions interfaces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.runtime.chat.request import ChatOptions
from seekforge.runtime.engine.outputs import CompletionOutput, RequestOutput
from seekforge.runtime.sampling.params import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LINE: Final = frozenset(("custom_id", "method", "url", "body"))
#: Keys of a body that change nothing about the text.
_IGNORED: Final = frozenset(
    ("model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier")
)
#: Keys that are taken with one value only -> that value.
_ONLY: Final[Mapping[str, object]] = {"stream": False, "echo": False, "suffix": None}
#: What a chat may come with; a template is a file of whoever runs the batch.
_OPTIONS: Final = tuple(name for name in ChatOptions.__annotations__ if name != "chat_template")
_OWN: Final = frozenset(
    field.name for field in fields(SamplingParams) if field.name not in ("logprobs", "structured_outputs", "taps")
)


@dataclass(frozen=True)
class Asked:
    """What one line asks for.

    Attributes:
        custom_id: whose it is.
        url: the address that it would have been sent to.
        prompt: the prompt of a completion; None for a chat.
        messages: the messages of a chat; None for a completion.
        options: what else a chat comes with: tools and the like.
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


def read_line(raw: Mapping[str, Any]) -> Asked:
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
    rest = {name: value for name, value in body.items() if name not in _IGNORED}
    for name, only in _ONLY.items():
        value = rest.pop(name, None)
        if value is not None and value != only:
            raise RequestError(f"body.{name} is {value!r}, which a batch cannot do; leave it out")
    params: dict[str, Any] = {}
    prompt, messages, options = None, None, dict[str, Any]()
    if url == CHAT:
        messages = rest.pop("messages", None)
        if not isinstance(messages, list):
            raise RequestError("body.messages is no list of objects")
        options = {name: rest.pop(name) for name in _OPTIONS if name in rest}
        if rest.get("max_completion_tokens") is not None:
            params["max_tokens"] = rest.pop("max_completion_tokens")
        if rest.pop("logprobs", None):
            params["logprobs"] = rest.pop("top_logprobs", None) or 0
        elif rest.pop("top_logprobs", None) is not None:
            raise RequestError("body.top_logprobs needs logprobs to be true")
    else:
        prompt = rest.pop("prompt", None)
        if rest.get("logprobs") is not None:
            params["logprobs"] = rest.pop("logprobs")
    rest = {name: value for name, value in rest.items() if value is not None}
    if "structured_outputs" in rest:
        params["structured_outputs"] = rest.pop("structured_outputs")
    unknown = sorted(rest.keys() - _OWN)
    if unknown:
        raise RequestError(f"body.{unknown[0]} is not known here; leave it out")
    return Asked(custom_id, url, prompt, messages, options, rest | params, str(body.get("model", "")))


def answer_line(
    asked: Asked, digest: str, output: RequestOutput, token_bytes: Callable[[int], bytes]
) -> dict[str, Any]:
    """Return the line of a result.

    Args:
        asked: the line that it answers.
        digest: the digest of the request; `id` carries it.
        output: the result.
        token_bytes: what a token is.
    """
    errors = [one.error for one in output.outputs if one.finish_reason == "error"]
    line: dict[str, Any] = {"id": request_id(digest), "custom_id": asked.custom_id, "response": None, "error": None}
    if errors:
        return line | {"error": {"code": "server_error", "message": errors[0]}}
    chat = asked.url == CHAT
    choices = [_choice(one, chat, token_bytes) for one in output.outputs]
    usage = output.usage
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": asked.model,
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


def _choice(one: CompletionOutput, chat: bool, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    reason = {"timeout": "length", "abort": "length"}.get(one.finish_reason, one.finish_reason)
    choice: dict[str, Any] = {"index": one.index, "finish_reason": reason, "logprobs": None}
    if one.message is not None:
        choice["message"] = one.message.to_dict()
        if one.message.tool_calls and reason == "stop":
            choice["finish_reason"] = "tool_calls"
    else:
        choice["text"] = one.text
    if one.logprobs is None:
        return choice

    def token(number: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(number)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    if chat:
        content = [
            token(entry.token_id, entry.logprob) | {"top_logprobs": [token(*top) for top in entry.top]}
            for entry in one.logprobs
        ]
        choice["logprobs"] = {"content": content}
        return choice
    tokens = [token(entry.token_id, entry.logprob) for entry in one.logprobs]
    choice["logprobs"] = {
        "tokens": [entry["token"] for entry in tokens],
        "token_logprobs": [entry["logprob"] for entry in tokens],
        "top_logprobs": [{token(*top)["token"]: top[1] for top in entry.top} for entry in one.logprobs],
        "text_offset": _offsets([entry["token"] for entry in tokens]),
    }
    return choice


def _offsets(tokens: Sequence[str]) -> list[int]:
    places, at = [], 0
    for token in tokens:
        places.append(at)
        at += len(token)
    return places
