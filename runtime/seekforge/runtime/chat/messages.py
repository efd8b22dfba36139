"""The messages of a conversation: read and checked once, here, and then trusted.

They have the keys of the OpenAI interface, with `reasoning_content` (or `reasoning`) for what the model thought.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from seekforge.common.errors import RequestError
from seekforge.runtime.values import listed, shown

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: Final[tuple[str, ...]] = get_args(Role)
#: Keys that would change what is asked, and what to use in their place.
_ELSEWHERE: Final = {"function_call": "tool_calls", "functions": "tools"}
#: What a name inside a tag cannot hold, since nothing there is escaped.
_NOT_IN_NAMES: Final = ('"', "\n", "\r")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to be called.

    Attributes:
        id: names the call where its result is given back.
        name: the name of the function.
        arguments: a JSON object as text; of a call that was cut off its beginning.
        problems: what of the model's text is not as it should be, a sentence each: a value that does not fit the
            tool's schema (and is passed on as text), a tag that is missing.
    """

    id: str
    name: str
    arguments: str
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the call as the OpenAI interface writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: who says it.
        content: the text; may be empty.
        reasoning_content: what the model thought before; None: nothing is known of it.
        tool_calls: what it wants to be called.
        tool_call_id: the call of a tool's result. Results without it are matched by their order.
        tools: functions, of a system or developer message.
        response_format: a JSON schema, of a system or developer message.
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return the message as the OpenAI interface writes it; it may stand in the next conversation."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            out["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            out["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.tools:
            out["tools"] = list(self.tools)
        if self.response_format is not None:
            out["response_format"] = self.response_format
        return out


@dataclass(frozen=True)
class ToolCallDelta:
    """What a call gained.

    Attributes:
        index: the number of the call in its message.
        id, name: those of the call, in its first delta; None later.
        arguments: further text of the arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class MessageDelta:
    """What a message gained; joined, the deltas of a stream are the message.

    Attributes:
        content, reasoning_content: further text.
        tool_calls: what calls gained, in the order of the text.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.tool_calls)

    @staticmethod
    def joined(deltas: Sequence[MessageDelta]) -> MessageDelta:
        """Return what several deltas say together."""
        calls: list[ToolCallDelta] = []
        for call in (call for delta in deltas for call in delta.tool_calls):
            if calls and calls[-1].index == call.index:
                calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + call.arguments)
            else:
                calls.append(call)
        return MessageDelta(
            "".join(delta.content for delta in deltas),
            "".join(delta.reasoning_content for delta in deltas),
            tuple(calls),
        )


def read_messages(messages: object) -> tuple[Message, ...]:
    """Return the messages of a conversation, each by itself as it should be.

    Args:
        messages: a list of `Message`, or of mappings with the keys of the OpenAI interface. Keys that are not known
            here change nothing.

    Raises:
        RequestError: naming the first that is wrong.
    """
    items = listed(messages)
    if items is None or isinstance(messages, Mapping):
        raise RequestError(f"messages is {shown(messages)}, expected a list of messages")
    if not items:
        raise RequestError("the conversation has no messages; pass at least one")
    return _results_in_order([_read(item, f"message {index}") for index, item in enumerate(items)])


def _results_in_order(messages: list[Message]) -> tuple[Message, ...]:
    """Put results behind one another as their calls are, where all of them say which call they belong to.

    The model was trained on results in the order of the calls and sees no ids; callers that run tools at the same time
    send results as they end.
    """
    start = 0
    while start < len(messages):
        stop = start + 1
        while stop < len(messages) and messages[stop].role == "tool":
            stop += 1
        places = {call.id: place for place, call in enumerate(messages[start].tool_calls) if call.id}
        results = messages[start + 1 : stop]
        ids = {result.tool_call_id for result in results}
        if len(ids) == len(results) == len(places) and ids == places.keys():
            messages[start + 1 : stop] = sorted(results, key=lambda result: places[result.tool_call_id or ""])
        start = stop
    return tuple(messages)


def is_conversation(messages: object) -> bool:
    """Whether this is one conversation, and not a list of several."""
    items = listed(messages)
    return items is None or not items or isinstance(items[0], (Mapping, Message)) or listed(items[0]) is None


def _read(item: object, where: str) -> Message:
    raw = item.to_dict() if isinstance(item, Message) else item
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} is {shown(raw)}, expected a mapping with role and content")
    role = raw.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: role is {shown(role)}, expected {', '.join(ROLES)}")
    for key, better in _ELSEWHERE.items():
        if raw.get(key) is not None:
            raise RequestError(f"{where} has {key}, which is not taken; use {better}")
    message = Message(
        role,
        _text(raw.get("content"), where),
        _reasoning(raw, where) if role == "assistant" else None,
        _calls(raw.get("tool_calls"), where) if role == "assistant" else (),
        _optional_text(raw.get("tool_call_id"), f"{where}: tool_call_id"),
        read_tools(raw.get("tools"), f"{where}: tools") if role in ("system", "developer") else (),
        _json(raw.get("response_format"), f"{where}: response_format") if role in ("system", "developer") else None,
    )
    if role in ("user", "tool") and raw.get("content") is None:
        raise RequestError(f"{where}: a {role} message without content, expected text")
    if role == "developer" and not message.content:
        raise RequestError(f"{where}: a developer message without content, expected text")
    return message


def _text(content: object, where: str) -> str:
    """Return the text of a content, also where it is a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = None if isinstance(content, Mapping) else listed(content)
    if parts is None:
        raise RequestError(f"{where}: content is {shown(content)}, expected text or a list of text parts")
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{where}: a part of its content is {shown(part)}, expected {{"type": "text", "text": ...}}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _optional_text(value: object, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}, expected text")
    return value


def _reasoning(raw: Mapping[str, Any], where: str) -> str | None:
    values = [_optional_text(raw.get(key), f"{where}: {key}") for key in ("reasoning_content", "reasoning")]
    present = [value for value in values if value is not None]
    if len(set(present)) > 1:
        raise RequestError(f"{where} has a reasoning_content and another reasoning, expected one of them")
    return present[0] if present else None


def _calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    items = [] if calls is None else listed(calls)
    if items is None or isinstance(calls, Mapping):
        raise RequestError(f"{where}: tool_calls is {shown(calls)}, expected a list of calls")
    return tuple(_call(item, f"{where}: tool call {number}") for number, item in enumerate(items))


def _call(item: object, where: str) -> ToolCall:
    raw = item.to_dict() if isinstance(item, ToolCall) else item
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{where} is {shown(raw)}, expected a mapping with a function")
    name = checked_name(function.get("name"), f"{where}: its name")
    arguments = function.get("arguments")
    try:
        values = json.loads(arguments or "{}") if isinstance(arguments, str) or arguments is None else arguments
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: its arguments are not JSON ({error})") from None
    if not isinstance(values, Mapping):
        raise RequestError(f"{where}: its arguments are {shown(values)}, expected a JSON object")
    for key in values:
        checked_name(key, f"{where}: the name of an argument")
    return ToolCall(_optional_text(raw.get("id"), f"{where}: id") or "", name, dumped(values, f"{where}: arguments"))


def read_tools(tools: object, name: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Return the function objects of tools: with `name`, and perhaps `description`, `parameters` and others.

    Args:
        tools: a list of `{"type": "function", "function": {...}}`, or of the inner objects alone; None is none.
        name: what the message calls them.

    Raises:
        RequestError: naming the first that is wrong.
    """
    items = [] if tools is None else listed(tools)
    if items is None or isinstance(tools, Mapping):
        raise RequestError(f"{name} is {shown(tools)}, expected a list of functions")
    functions: list[Mapping[str, Any]] = []
    for number, item in enumerate(items):
        where = f"{name}, entry {number}"
        kind = item.get("type", "function") if isinstance(item, Mapping) else None
        function = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or ("function" in item and kind != "function"):
            raise RequestError(f'{where} is {shown(item)}, expected {{"type": "function", "function": {{...}}}}')
        checked_name(function.get("name"), f"{where}: its name")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"{where}: parameters is {shown(parameters)}, expected a JSON schema of an object")
        dumped(function, where)
        functions.append(function)
    names = [function["name"] for function in functions]
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        raise RequestError(f"{name} has two functions called {shown(twice)}, expected each name once")
    return tuple(functions)


def checked_name(value: object, name: str) -> str:
    """Return a name that can stand in a tag.

    Raises:
        RequestError: it is no text, empty, or holds a quotation mark or the end of a line.
    """
    if not isinstance(value, str) or not value or any(char in value for char in _NOT_IN_NAMES):
        raise RequestError(f"{name} is {shown(value)}, expected text without quotation marks and ends of lines")
    return value


def dumped(value: object, name: str) -> str:
    """Return a value as the model was trained to see it: JSON with spaces after commas and colons, all of Unicode.

    Raises:
        RequestError: it cannot be written as JSON.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} cannot be written as JSON ({error})") from None


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _json(value: object, name: str) -> Any:
    if value is not None:
        dumped(value, name)
    return value
