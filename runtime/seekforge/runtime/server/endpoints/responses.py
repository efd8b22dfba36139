"""/v1/responses: the part of OpenAI's Responses interface that keeps nothing between requests.

Source: field names, shapes and events are those of OpenAI's published API reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from seekforge.common.records import Record
from seekforge.runtime.chat import MessageDelta
from seekforge.runtime.openai.answers import TokenRow, chat_logprobs
from seekforge.runtime.openai.protocol import BodyError, read_body
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.server.channel import End, Piece
from seekforge.runtime.server.context import Call
from seekforge.runtime.server.conversation import Conversation
from seekforge.runtime.server.sse import event

#: Keys that change nothing about the answer, since nothing is kept.
_IGNORED: Final = frozenset(
    ("store", "include", "truncation", "background", "max_tool_calls", "stream_options", "prompt_cache_options")
)
#: Keys that need something that is kept -> what to do instead.
_REFUSED: Final[Mapping[str, str]] = {
    "previous_response_id": "nothing is kept here; send the whole conversation as input",
    "conversation": "nothing is kept here; send the whole conversation as input",
    "prompt": "templates of prompts are kept by OpenAI; send input and instructions",
}


class ResponsesBody(Record):
    """The body of /v1/responses.

    Attributes:
        input: text, or items: messages, function calls and their outputs, reasoning.
        instructions: what the model is told before.
        tools: functions, with their keys beside "type".
        tool_choice: "none", "auto", "required", or {"type": "function", "name": ...}.
        parallel_tool_calls: false: one call at most.
        reasoning: {"effort": ...}: "none" answers at once; any other lets the model think first.
        text: {"format": ...} gives the answer a form.
        max_output_tokens: most tokens of the answer; by default the rest of the context.
        top_logprobs: log-probabilities of so many likely tokens.
    """

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None


async def responses(call: Call) -> ASGIApp:
    """Answer a conversation."""
    raw = call.body
    if isinstance(raw, dict):
        for name, instead in _REFUSED.items():
            if raw.get(name) is not None:
                raise BodyError(f"{name} is not done here: {instead}", name)
        if raw.get("background"):
            raise BodyError("background is not done here: nothing is kept; leave it out", "background")
        if raw.get("truncation") not in (None, "disabled"):
            raise BodyError("truncation is not done here: send the part of the conversation that counts", "truncation")
        raw = {name: value for name, value in raw.items() if name not in _IGNORED}
    body, context = read_body(ResponsesBody, raw), call.context
    context.check_model(body.model)
    conversation = await Conversation.of(context, _messages(body), _params(body, context.defaults), _options(body))
    if body.stream:
        return await call.event_stream(_events(call, body, conversation))
    return await call.unless_gone(_whole(call, body, conversation))


def _params(body: ResponsesBody, defaults: SamplingParams) -> SamplingParams:
    said: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    for name, key in (("temperature", "temperature"), ("top_p", "top_p"), ("top_logprobs", "logprobs")):
        if getattr(body, name) is not None:
            said[key] = getattr(body, name)
    return replace(defaults, **said)


def _options(body: ResponsesBody) -> dict[str, Any]:
    effort = (body.reasoning or {}).get("effort")
    options: dict[str, Any] = {"chat_template_kwargs": {"thinking": effort not in (None, "none")}}
    if body.tools:
        options["tools"] = [_tool(one, number) for number, one in enumerate(body.tools)]
    if body.tool_choice is not None:
        choice = body.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        options["tool_choice"] = choice
    if body.parallel_tool_calls is not None:
        options["parallel_tool_calls"] = body.parallel_tool_calls
    form = (body.text or {}).get("format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    if form is not None:
        options["response_format"] = form
    return options


def _tool(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    if raw.get("type") != "function":
        raise BodyError(
            f"tools.{number} is of type {str(raw.get('type'))[:80]!r}, which OpenAI's servers run; expected functions",
            f"tools.{number}.type",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: raw[name] for name in names if raw.get(name) is not None}}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return the messages as the chat interface writes them.

    Raises:
        BodyError: an item is not done here.
    """
    out: list[dict[str, Any]] = []
    if body.instructions:
        out.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*out, {"role": "user", "content": body.input}]
    for number, item in enumerate(body.input):
        where = f"input.{number}"
        match item.get("type", "message"):
            case "message":
                role = item.get("role")
                text = _text(item.get("content"), f"{where}.content")
                if role == "assistant":
                    turn = _turn(out)
                    turn["content"] += text
                elif role in ("developer", "system") and not (out and out[-1]["role"] == "system"):
                    out.append({"role": "system", "content": text})
                elif role in ("developer", "system"):
                    out[-1]["content"] += f"\n\n{text}"
                else:
                    out.append({"role": role, "content": text})
            case "reasoning":
                turn = _turn(out)
                turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(
                    item.get("content") or [], f"{where}.content"
                )
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": str(item.get("call_id")), "type": "function", "function": function}
                _turn(out).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                text = _text(item.get("output"), f"{where}.output")
                out.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": text})
            case kind:
                raise BodyError(
                    f"{where} is of type {str(kind)[:80]!r}, expected message, reasoning, function_call or "
                    "function_call_output",
                    where,
                )
    return out


def _turn(out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's turn at the end, which several items make."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BodyError(f"{where} is neither text nor a list of text parts", where)
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BodyError(f"{where}.{number} is no text; this model reads text", f"{where}.{number}")
    return "".join(part["text"] for part in content)


class _Output:
    """The items of a response while they come.

    Attributes:
        items: all so far; the last may be open.
    """

    def __init__(self, call: Call, wants_logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._call, self._wants_logprobs = call, wants_logprobs
        self._rows: list[TokenRow] = []
        self._open = ""
        self._sequence = -1

    def event(self, kind: str, **said: Any) -> bytes:
        """Return an event, numbered."""
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence, **said}, kind)

    def take_all(self, piece: Piece, deltas: list[MessageDelta]) -> list[bytes]:
        """Take what came; returns its events. Log-probabilities wait for the text of their tokens."""
        self._rows += piece.logprobs
        return [one for delta in deltas for one in self._take(delta)]

    def _take(self, delta: MessageDelta) -> list[bytes]:
        out: list[bytes] = []
        if delta.reasoning_content:
            self._rows = []  # a thought has none to show
            out += self._turn("reasoning", {"type": "reasoning", "summary": [], "content": []})
            out += self._gain("response.reasoning_text", "reasoning_text", delta.reasoning_content)
        if delta.content:
            out += self._turn("message", {"type": "message", "role": "assistant", "content": []})
            rows, self._rows = self._rows, []
            logprobs = self._logprobs(rows)
            out += self._gain("response.output_text", "output_text", delta.content, logprobs=logprobs)
        for one in delta.tool_calls:
            if one.id is not None:
                item = {"type": "function_call", "call_id": one.id, "name": one.name, "arguments": ""}
                out += self._turn(f"call {one.index}", item)
            if one.arguments:
                item = self.items[-1]
                item["arguments"] += one.arguments
                out.append(self.event("response.function_call_arguments.delta", **self._place(), delta=one.arguments))
        return out

    def close(self, status: str) -> list[bytes]:
        """Return the events that end the item that is open."""
        if not self._open:
            return []
        self._open = ""
        item, place = self.items[-1], self._place()
        out: list[bytes] = []
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            out.append(self.event("response.function_call_arguments.done", **place, **said))
        else:
            (part,) = item["content"]
            kind = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            more = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
            out.append(self.event(f"response.{kind}.done", **place, content_index=0, text=part["text"], **more))
            out.append(self.event("response.content_part.done", **place, content_index=0, part=part))
        item["status"] = status
        out.append(self.event("response.output_item.done", output_index=place["output_index"], item=item))
        return out

    def _logprobs(self, rows: list[TokenRow]) -> list[Any]:
        if not self._wants_logprobs:
            return []
        return chat_logprobs(rows, self._call.context.tokenizer.written_bytes)["content"]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _turn(self, kind: str, item: dict[str, Any]) -> list[bytes]:
        if self._open == kind:
            return []
        out = self.close("completed")
        self._open = kind
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[item["type"]]
        item = {"id": f"{prefix}_{self._call.request_id}_{len(self.items)}", "status": "in_progress", **item}
        self.items.append(item)
        out.append(self.event("response.output_item.added", output_index=len(self.items) - 1, item=item))
        return out

    def _gain(self, name: str, kind: str, text: str, **more: Any) -> list[bytes]:
        item, out = self.items[-1], []
        if not item["content"]:
            part: dict[str, Any] = {"type": kind, "text": ""}
            if kind == "output_text":
                part |= {"annotations": [], "logprobs": []}
            item["content"].append(part)
            out.append(self.event("response.content_part.added", **self._place(), content_index=0, part=part))
        part = item["content"][0]
        part["text"] += text
        if more.get("logprobs"):
            part["logprobs"] += more["logprobs"]
        return [*out, self.event(f"{name}.delta", **self._place(), content_index=0, delta=text, **more)]


def _response(call: Call, body: ResponsesBody, status: str, items: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "id": f"resp_{call.request_id}",
        "object": "response",
        "created_at": call.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": call.context.model_name,
        "output": items,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": {},
        **more,
    }


def _ended(call: Call, body: ResponsesBody, conversation: Conversation, end: End, items: list[dict[str, Any]]) -> Any:
    """Return the kind of the last event, and the whole response."""
    cut = conversation.choices[0].reason == "length"
    usage = {
        "input_tokens": end.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": end.num_cached_tokens},
        "output_tokens": end.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": conversation.num_reasoning_tokens},
        "total_tokens": end.num_prompt_tokens + end.num_completion_tokens,
    }
    more = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
    status = "incomplete" if cut else "completed"
    return f"response.{status}", _response(call, body, status, items, usage=usage, **more)


async def _whole(call: Call, body: ResponsesBody, conversation: Conversation) -> JSONResponse:
    output = _Output(call, body.top_logprobs is not None)
    async for gained in conversation.deltas(call):
        for _, piece, deltas in gained:
            output.take_all(piece, deltas)
    assert conversation.end is not None
    output.close("incomplete" if conversation.choices[0].reason == "length" else "completed")
    return JSONResponse(_ended(call, body, conversation, conversation.end, output.items)[1])


async def _events(call: Call, body: ResponsesBody, conversation: Conversation) -> AsyncGenerator[bytes, None]:
    output, began = _Output(call, body.top_logprobs is not None), False
    async with contextlib.aclosing(conversation.deltas(call)) as gains:
        async for gained in gains:
            if not began:
                began = True
                made = _response(call, body, "in_progress", [])
                yield output.event("response.created", response=made) + output.event(
                    "response.in_progress", response=made
                )
                continue
            chunk: list[bytes] = []
            for _, piece, deltas in gained:
                chunk += output.take_all(piece, deltas)
            if chunk:
                yield b"".join(chunk)
    assert conversation.end is not None
    last = output.close("incomplete" if conversation.choices[0].reason == "length" else "completed")
    kind, made = _ended(call, body, conversation, conversation.end, output.items)
    yield b"".join((*last, output.event(kind, response=made)))
