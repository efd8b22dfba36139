"""From a model's text to a message, while it comes: reasoning, content, and tool calls with their arguments."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from seekforge.runtime.chat.messages import Message, MessageDelta, ToolCall, ToolCallDelta
from seekforge.runtime.chat.scanner import Scanner, Span
from seekforge.runtime.chat.tag_scanner import TagScanner, TagSyntax

#: Whose tags calls are written with.
Syntax = Literal["deepseek_v32"] | TagSyntax

#: JSON type of a schema -> types of Python that a value of it has.
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def new_call_id() -> str:
    """Return an id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


class ChatParser:
    """Reads one completion. `push` its text as it comes, then `finish`.

    Joined, the deltas are the message, however the text was cut. An argument whose tag says string="true" is text and
    streamed; any other is JSON, given out when it is complete. What is no JSON, or of another type than the tool's
    schema says, is passed on as text, with the reason among the `problems` of its call. A text that ends early gives a
    call whose arguments end early: nothing is added.

    Attributes:
        problems: what is wrong outside of calls.

    Example:
        >>> parser = ChatParser(in_reasoning=True)
        >>> deltas = [*parser.push("It is 4."), *parser.push("</think>"), *parser.push("4"), *parser.finish()]
        >>> parser.message.reasoning_content, parser.message.content
        ('It is 4.', '4')
    """

    def __init__(
        self,
        *,
        in_reasoning: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_calls: bool = True,
        syntax: Syntax = "deepseek_v32",
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Start at the beginning of a completion.

        Args:
            in_reasoning: whether the prompt ends inside a thought, as `SegmentedText.in_reasoning` says.
            tools: the functions that may be called; None: nothing is known of them.
            tool_calls: whether calls are looked for; else their text is content.
            syntax: whose tags they are written with.
            make_id: gives the id of a call to which the model gave none, or that of another one.
        """
        self._scanner: Scanner | TagScanner = (
            Scanner(in_reasoning=in_reasoning, tool_calls=tool_calls)
            if syntax == "deepseek_v32"
            else TagScanner(syntax, in_reasoning=in_reasoning, tool_calls=tool_calls)
        )
        self._tools = None if tools is None else {tool["name"]: tool for tool in tools}
        self._make_id = make_id
        self._thought = in_reasoning
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[_Call] = []
        self._open: _Call | None = None
        self.problems: list[str] = []

    def push(self, piece: str) -> Iterator[MessageDelta]:
        """Take a piece of text; returns what is certain of the message by now."""
        return iter(self._deltas(self._scanner.push(piece)))

    def finish(self) -> Iterator[MessageDelta]:
        """Take the end of the text; returns what was held back."""
        deltas = self._deltas(self._scanner.finish())
        if self._open is not None:
            arguments = self._open.cut_off()
            if arguments:
                deltas.append(MessageDelta(tool_calls=(ToolCallDelta(len(self._calls) - 1, arguments=arguments),)))
            self._open = None
        return iter(deltas)

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is thought."""
        return self._scanner.in_reasoning

    @property
    def message(self) -> Message:
        """The message so far."""
        reasoning = "".join(self._reasoning) if self._thought or self._reasoning else None
        return Message("assistant", "".join(self._content), reasoning, tuple(call.result() for call in self._calls))

    def _deltas(self, spans: Iterator[Span]) -> list[MessageDelta]:
        """Turn spans into deltas; neighbors that are text of one kind are joined."""
        deltas: list[MessageDelta] = []
        for span in spans:
            if span.problem is not None:
                (self.problems if self._open is None else self._open.problems).append(span.problem)
            match span.kind:
                case "reasoning":
                    self._reasoning.append(span.text)
                    deltas.append(MessageDelta(reasoning_content=span.text))
                case "content":
                    self._content.append(span.text)
                    deltas.append(MessageDelta(content=span.text))
                case "markup":
                    pass
                case _:
                    call = self._call_delta(span)
                    if call is not None:
                        deltas.append(MessageDelta(tool_calls=(call,)))
        return deltas

    def _call_delta(self, span: Span) -> ToolCallDelta | None:
        if span.kind == "call":
            is_new = span.call_id and all(call.id != span.call_id for call in self._calls)
            self._open = _Call(span.call_id if is_new else self._make_id(), span.name, self._tools)
            self._calls.append(self._open)
            return ToolCallDelta(len(self._calls) - 1, self._open.id, span.name)
        call = self._open
        assert call is not None
        arguments = call.take(span)
        if span.kind == "end_call":
            self._open = None
        return ToolCallDelta(len(self._calls) - 1, arguments=arguments) if arguments else None


class _Call:
    """One call while it comes.

    Attributes:
        problems: what is wrong with it.
    """

    def __init__(self, call_id: str, name: str, tools: Mapping[str, Mapping[str, Any]] | None) -> None:
        self.id, self.name = call_id, name
        self.problems: list[str] = []
        tool = None if tools is None else tools.get(name)
        if tools is not None and tool is None:
            self.problems.append(f"there is no tool {name!r}")
        properties = ((tool or {}).get("parameters") or {}).get("properties")
        self._schemas: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._written: list[str] = []
        self._keys: set[str] = set()
        self._key = ""
        self._may_be_text = False  # whether the value is text where it is no JSON
        self._streams = False  # whether the value is text, which is given out as it comes
        self._value: list[str] = []
        self._body: list[str] = []

    def result(self) -> ToolCall:
        """Return the call as far as it came."""
        return ToolCall(self.id, self.name, "".join(self._written), tuple(self.problems))

    def take(self, span: Span) -> str:
        """Take a span; returns what the arguments gain."""
        new = self._gain(span)
        if new:
            self._written.append(new)
        return new

    def cut_off(self) -> str:
        """Take the end of a text that ends inside the call; returns what the arguments gain."""
        self.problems.append("the text ends inside the call")
        new = "".join(self._value)  # of a value that was to be complete before it is given out
        if new:
            self._written.append(new)
        return new

    def _gain(self, span: Span) -> str:
        match span.kind:
            case "parameter":
                return self._begin(span)
            case "value" if self._streams:
                return _escaped(span.text)
            case "value":
                self._value.append(span.text)
                return ""
            case "end_parameter":
                text, self._value = "".join(self._value), []
                return '"' if self._streams else self._json(text)
            case "body":
                self._body.append(span.text)
                return span.text
            case _:  # the end of the call
                if self._body:
                    value = _parsed("".join(self._body))
                    if not isinstance(value, dict):
                        self.problems.append("the arguments are no JSON object")
                    return ""
                return "}" if self._keys else "{}"

    def _begin(self, span: Span) -> str:
        if span.name in self._keys:
            self.problems.append(f"the argument {span.name!r} is there twice")
        before = ", " if self._keys else "{"
        self._keys.add(span.name)
        self._key = span.name
        is_text = _types(self._schema()) == ("string",)
        self._may_be_text = span.string == "either"
        self._streams = span.string == "true" or (span.string in (None, "either") and is_text)
        return f"{before}{json.dumps(span.name, ensure_ascii=False)}: " + ('"' if self._streams else "")

    def _schema(self) -> Any:
        return self._schemas.get(self._key)

    def _json(self, text: str) -> str:
        """Return the JSON of a value that is none of text; as text where it does not fit."""
        value, types = _parsed(text), _types(self._schema())
        if value is _NO_JSON and self._may_be_text and (types is None or "string" in types):
            return json.dumps(text, ensure_ascii=False)
        if value is _NO_JSON:
            self.problems.append(f"the argument {self._key!r} is no JSON; it is passed on as text")
        elif types is not None and not any(_is(value, one) for one in types):
            self.problems.append(f"the argument {self._key!r} is not of type {' or '.join(types)}; it is text")
            if isinstance(value, str):
                return text
        else:
            return text
        return json.dumps(text, ensure_ascii=False)


_NO_JSON: Final = object()


def _parsed(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NO_JSON


def _types(schema: Any) -> tuple[str, ...] | None:
    """Return the types that a schema names; None where it says otherwise what it takes."""
    types = schema.get("type") if isinstance(schema, Mapping) else None
    types = (types,) if isinstance(types, str) else types
    if not isinstance(types, (list, tuple)) or not types or not all(one in _TYPES for one in types):
        return None
    return tuple(types)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _escaped(text: str) -> str:
    """Return text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
