"""/v1/messages and /v1/messages/count_tokens: Anthropic's interface, which agents speak.

Source: field names, shapes and events are those of Anthropic's published API reference.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from seekforge.common.errors import RequestError
from seekforge.common.records import Record
from seekforge.runtime.chat import MessageDelta, ToolCall
from seekforge.runtime.openai.protocol import BodyError, read_body
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.channel import End
from seekforge.runtime.server.context import Call
from seekforge.runtime.server.conversation import Choice, Conversation
from seekforge.runtime.server.sse import event

#: Keys that change nothing about the answer.
_IGNORED: Final = frozenset(
    ("metadata", "service_tier", "cache_control", "context_management", "betas", "container", "inference_geo")
)
_CHOICES: Final[Mapping[str, Any]] = {"auto": "auto", "any": "required", "none": "none"}


class MessagesBody(Record):
    """The body of /v1/messages.

    Attributes:
        max_tokens: most tokens of the answer.
        messages: the conversation: roles user and assistant; contents are text or blocks.
        system: what the model is told before, as text or text blocks.
        tools: functions with name, description and input_schema.
        tool_choice: {"type": "auto" | "any" | "tool" | "none"}, with name and disable_parallel_tool_use.
        thinking: {"type": "enabled", "budget_tokens": ...} lets the model think first; "adaptive" too.
        stop_sequences: texts that end the answer.
        output_config: {"format": {"type": "json_schema", "schema": ...}} gives the answer that form.
    """

    model: str | None = None
    max_tokens: int
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    output_config: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


class CountTokensBody(Record):
    """The body of /v1/messages/count_tokens; each key is as in `MessagesBody`."""

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


async def messages(call: Call) -> ASGIApp:
    """Answer a conversation."""
    body = _read(MessagesBody, call.body)
    call.context.check_model(body.model)
    conversation = await _conversation(call, body, _params(body, call.context.defaults))
    if body.stream:
        return await call.event_stream(_events(call, conversation))
    return await call.unless_gone(_whole(call, conversation))


async def count_tokens(call: Call) -> ASGIApp:
    """Count the tokens of a conversation's prompt."""
    body = _read(CountTokensBody, call.body)
    call.context.check_model(body.model)
    conversation = await _conversation(call, body, call.context.defaults)
    return JSONResponse({"input_tokens": len(conversation.prompt_ids)})


def _read(kind: Any, raw: Any) -> Any:
    if isinstance(raw, dict):
        raw = {name: value for name, value in raw.items() if name not in _IGNORED}
    return read_body(kind, raw)


def _params(body: MessagesBody, defaults: SamplingParams) -> SamplingParams:
    said: dict[str, Any] = {"max_tokens": body.max_tokens}
    for name in ("temperature", "top_p", "top_k"):
        if getattr(body, name) is not None:
            said[name] = getattr(body, name)
    if body.stop_sequences:
        said["stop"] = body.stop_sequences
    budget = (body.thinking or {}).get("budget_tokens")
    if budget is not None:
        said["thinking_token_budget"] = budget
    return replace(defaults, **said)


async def _conversation(call: Call, body: MessagesBody | CountTokensBody, params: SamplingParams) -> Conversation:
    """Return the conversation in OpenAI's words, checked."""
    options: dict[str, Any] = {"chat_template_kwargs": {"thinking": _thinks(body.thinking)}}
    if body.tools:
        options["tools"] = [_tool(one, number) for number, one in enumerate(body.tools)]
    if body.tool_choice is not None:
        options |= _tool_choice(body.tool_choice)
    form = (body.output_config or {}).get("format")
    if form is not None:
        if not isinstance(form, Mapping) or form.get("type") != "json_schema" or "schema" not in form:
            raise BodyError(
                'output_config.format is not {"type": "json_schema", "schema": ...}', "output_config.format"
            )
        options["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    said = _messages(body)
    if said[-1]["role"] == "assistant":  # the answer begins with what is there
        options["continue_final_message"] = True
    return await Conversation.of(call.context, said, params, options)


def _thinks(thinking: Mapping[str, Any] | None) -> bool:
    kind = "disabled" if thinking is None else thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise BodyError(f"thinking.type is {kind!r}, expected 'enabled', 'adaptive' or 'disabled'", "thinking.type")
    return kind != "disabled"


def _tool(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    kind = raw.get("type", "custom")
    if kind != "custom":
        raise BodyError(
            f"tools.{number} is of type {str(kind)[:80]!r}, which a client's own server runs; expected functions "
            "with name and input_schema",
            f"tools.{number}.type",
        )
    function = {name: raw[name] for name in ("name", "description") if name in raw}
    return {"type": "function", "function": function | {"parameters": raw.get("input_schema", {"type": "object"})}}


def _tool_choice(raw: Mapping[str, Any]) -> dict[str, Any]:
    kind = raw.get("type")
    if kind == "tool":
        choice: Any = {"type": "function", "function": {"name": raw.get("name")}}
    elif isinstance(kind, str) and kind in _CHOICES:
        choice = _CHOICES[kind]
    else:
        raise BodyError(
            f"tool_choice.type is {str(kind)[:80]!r}, expected 'auto', 'any', 'tool' or 'none'", "tool_choice.type"
        )
    out = {"tool_choice": choice}
    return out | {"parallel_tool_calls": False} if raw.get("disable_parallel_tool_use") else out


def _messages(body: MessagesBody | CountTokensBody) -> list[dict[str, Any]]:
    """Return the messages as OpenAI's interface writes them.

    Raises:
        BodyError: one has a block that is not done here.
    """
    out: list[dict[str, Any]] = []
    if body.system:
        out.append({"role": "system", "content": _text(body.system, "system")})
    if not body.messages:
        raise BodyError("messages is empty, expected at least one", "messages")
    for number, raw in enumerate(body.messages):
        where = f"messages.{number}"
        role, content = raw.get("role"), raw.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role not in ("user", "assistant"):
            raise BodyError(f"{where}.role is {str(role)[:80]!r}, expected 'user' or 'assistant'", f"{where}.role")
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise BodyError(f"{where}.content is neither text nor a list of blocks", f"{where}.content")
        out += (_user if role == "user" else _assistant)(blocks, f"{where}.content", out)
    return out


def _user(blocks: list[dict[str, Any]], where: str, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a user's message: results of tools first, in the order of their calls, then what the user says."""
    results: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    for number, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_result":
            call_id = str(block.get("tool_use_id"))
            content = _text(block.get("content") or "", f"{where}.{number}.content")
            results[call_id] = {"role": "tool", "tool_call_id": call_id, "content": content}
        elif kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        else:
            raise _unknown(block, f"{where}.{number}", "text and tool_result")
    if not results:
        return [{"role": "user", "content": "".join(texts)}]
    calls = [call["id"] for call in before[-1].get("tool_calls", ())] if before else []
    if sorted(calls) != sorted(results):
        raise BodyError(
            f"{where}: tool results are for {', '.join(results)[:200]}, the calls before it are "
            f"{', '.join(calls)[:200] or 'none'}; give one result for each call",
            where,
        )
    out = [results[call_id] for call_id in calls]
    return [*out, {"role": "user", "content": "".join(texts)}] if texts else out


def _assistant(blocks: list[dict[str, Any]], where: str, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for number, block in enumerate(blocks):
        match block.get("type"):
            case "text" if isinstance(block.get("text"), str):
                message["content"] += block["text"]
            case "thinking" if isinstance(block.get("thinking"), str):
                message["reasoning_content"] = message.get("reasoning_content", "") + block["thinking"]
            case "redacted_thinking":
                pass  # nobody but its maker can read it
            case "tool_use":
                call = {
                    "name": block.get("name"),
                    "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
                }
                message.setdefault("tool_calls", []).append(
                    {"id": str(block.get("id")), "type": "function", "function": call}
                )
            case _:
                raise _unknown(block, f"{where}.{number}", "text, thinking and tool_use")
    return [message]


def _unknown(block: Mapping[str, Any], where: str, expected: str) -> BodyError:
    return BodyError(f"{where} is a block of type {str(block.get('type'))[:80]!r}, expected {expected}", where)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BodyError(f"{where} is neither text nor a list of text blocks", where)
    for number, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise BodyError(f"{where}.{number} is no text block; this model reads text", f"{where}.{number}")
    return "".join(block["text"] for block in content)


def _stop_reason(choice: Choice) -> tuple[str, str | None]:
    """Return why the answer ended, and the stop sequence that ended it."""
    if choice.reason == "tool_calls":
        return "tool_use", None
    if isinstance(choice.stop_reason, str):
        return "stop_sequence", choice.stop_reason
    return ("end_turn" if choice.reason == "stop" else "max_tokens"), None


def _usage(end: End) -> dict[str, int]:
    return {
        "input_tokens": end.num_prompt_tokens - end.num_cached_tokens,
        "cache_read_input_tokens": end.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": end.num_completion_tokens,
    }


async def _whole(call: Call, conversation: Conversation) -> JSONResponse:
    end = await conversation.whole(call)
    (choice,) = conversation.choices
    said = choice.parser.message
    content: list[dict[str, Any]] = []
    if said.reasoning_content:
        content.append({"type": "thinking", "thinking": said.reasoning_content, "signature": ""})
    if said.content:
        content.append({"type": "text", "text": said.content})
    content += [{"type": "tool_use", "id": one.id, "name": one.name, "input": _input(one)} for one in said.tool_calls]
    reason, sequence = _stop_reason(choice)
    return JSONResponse(
        {
            "id": f"msg_{call.request_id}",
            "type": "message",
            "role": "assistant",
            "model": call.context.model_name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(end),
        }
    )


def _input(one: ToolCall) -> Any:
    """Return the arguments of a call; where they were cut off, their text under one key."""
    try:
        return json.loads(one.arguments or "{}")
    except ValueError:
        return {"arguments": one.arguments}


class _Blocks:
    """The content blocks of one streamed message: one is open at a time."""

    def __init__(self) -> None:
        self._number = -1
        self._open = ""

    def take(self, delta: MessageDelta) -> list[bytes]:
        """Return the events of what the message gained."""
        out: list[bytes] = []
        if delta.reasoning_content:
            out += self._turn("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            out.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning_content}))
        if delta.content:
            out += self._turn("text", {"type": "text", "text": ""})
            out.append(self._delta({"type": "text_delta", "text": delta.content}))
        for one in delta.tool_calls:
            if one.id is not None:
                out += self._turn(
                    f"tool {one.index}", {"type": "tool_use", "id": one.id, "name": one.name, "input": {}}
                )
            if one.arguments:
                out.append(self._delta({"type": "input_json_delta", "partial_json": one.arguments}))
        return out

    def close(self) -> list[bytes]:
        """Return the end of the block that is open."""
        if not self._open:
            return []
        out = []
        if self._open == "thinking":
            out.append(self._delta({"type": "signature_delta", "signature": ""}))
        self._open = ""
        return [*out, event({"type": "content_block_stop", "index": self._number}, "content_block_stop")]

    def _turn(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if self._open == kind:
            return []
        out = self.close()
        self._open = kind
        self._number += 1
        start = {"type": "content_block_start", "index": self._number, "content_block": block}
        return [*out, event(start, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._number, "delta": delta}, "content_block_delta")


async def _events(call: Call, conversation: Conversation) -> AsyncGenerator[bytes, None]:
    blocks, began = _Blocks(), False
    async with contextlib.aclosing(conversation.deltas(call)) as gains:
        async for gained in gains:
            if not began:
                began = True
                message = {
                    "id": f"msg_{call.request_id}",
                    "type": "message",
                    "role": "assistant",
                    "model": call.context.model_name,
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": {"input_tokens": len(conversation.prompt_ids), "output_tokens": 0},
                }
                yield event({"type": "message_start", "message": message}, "message_start") + event(
                    {"type": "ping"}, "ping"
                )
                continue
            chunk = b"".join(one for _, _, deltas in gained for delta in deltas for one in blocks.take(delta))
            if chunk:
                yield chunk
    end, (choice,) = conversation.end, conversation.choices
    if end is None:
        raise RequestError("the request ended without a result")
    reason, sequence = _stop_reason(choice)
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    yield b"".join(
        (
            *blocks.close(),
            event({"type": "message_delta", "delta": delta, "usage": _usage(end)}, "message_delta"),
            event({"type": "message_stop"}, "message_stop"),
        )
    )
