"""From messages to the prompt of DeepSeek-V3.2, byte for byte (spec §8.2, §8.3).

What a message says is text and stays text; only what is written here can be a special token.
Departure from the released encoder: earlier developer messages are kept. Dropping them shifts the indices of messages
and breaks the rendering of what follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from seekforge.common.errors import RequestError
from seekforge.formats.checkpoint.tools_preamble import TOOLS_PREAMBLE
from seekforge.runtime.chat import markup
from seekforge.runtime.chat.messages import Message, ToolCall, dumped, read_messages, read_tools
from seekforge.runtime.text.segments import Segment, SegmentedText

_RESPONSE_FORMAT: Final = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_BEFORE_SCHEMAS, _AFTER_SCHEMAS = TOOLS_PREAMBLE.format(
    dsml_token=markup.DSML,
    thinking_start_token=markup.THINK_START,
    thinking_end_token=markup.THINK_END,
    tool_schemas="\0",
).split("\0")


def encode(
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> SegmentedText:
    """Return the prompt of a conversation, begin of sequence included.

    Args:
        messages: `Message`s, or mappings with the keys of the OpenAI interface.
        thinking: let the model reason before it answers. Of earlier turns the reasoning since the last user message
            is kept, since a tool loop goes on with it; what is older is left out, as the model was trained.
        tools: functions; told in the first message if that is a system message, else in one before it.
        response_format: a JSON schema that the answer shall follow; told like `tools`.
        add_generation_prompt: end where the assistant begins to speak; False leaves that out after a user message.
        continue_final_message: leave the last message, an assistant's, open for the model to go on with.

    Raises:
        RequestError: the messages cannot stand like this.
    """
    return encode_read(
        with_instructions(read_messages(messages), read_tools(tools), response_format),
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )


def with_instructions(
    messages: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...], response_format: Any
) -> tuple[Message, ...]:
    """Return the messages with what a request says beside them in the first system message.

    Raises:
        RequestError: a message says the same.
    """
    if not tools and response_format is None:
        return messages
    first, rest = messages[0], messages[1:]
    if first.role != "system":
        first, rest = Message("system"), messages
    for name, present, new in (
        ("tools", first.tools, tools),
        ("response_format", first.response_format, response_format),
    ):
        if present and new:
            raise RequestError(f"the request and its system message both have {name}, expected one of them")
    if response_format is not None:
        dumped(response_format, "response_format")
    return (
        replace(
            first,
            tools=first.tools or tools,
            response_format=first.response_format if response_format is None else response_format,
        ),
        *rest,
    )


def encode_read(
    messages: tuple[Message, ...], *, thinking: bool, add_generation_prompt: bool, continue_final_message: bool
) -> SegmentedText:
    """Return the prompt of messages that were read; otherwise as `encode`."""
    last = messages[-1]
    if continue_final_message and last.role != "assistant":
        raise RequestError(f"continue_final_message goes on with an assistant message, the last one is of {last.role}")
    if continue_final_message and last.tool_calls:
        raise RequestError("continue_final_message goes on with text, the last message ends in tool calls")
    encoder = _Encoder(messages, thinking, continue_final_message)
    segments = [Segment(markup.BOS, True)]
    for index in range(len(messages)):
        segments += encoder.message(index)
    if not add_generation_prompt:
        _take_back(segments, last.role, thinking)
    ends = segments[-1]
    open_thought = ends.special and ends.text.endswith(markup.THINK_START)
    return SegmentedText.of(segments, in_reasoning=open_thought or encoder.ends_in_reasoning)


def _take_back(segments: list[Segment], role: str, thinking: bool) -> None:
    """Remove the beginning of an answer from the end."""
    opens = (markup.THINK_START, markup.THINK_END)
    if role in ("user", "developer"):
        assert segments[-1].text in tuple(markup.ASSISTANT + opening for opening in opens)
        segments.pop()
    elif role == "tool" and segments[-1].text.endswith(opens):
        text = segments.pop().text
        segments.append(Segment(text.removesuffix(opens[0]).removesuffix(opens[1]), True))


class _Encoder:
    """Writes the messages of one conversation.

    Attributes:
        ends_in_reasoning: whether the last message was left open inside its reasoning.
    """

    def __init__(self, messages: tuple[Message, ...], thinking: bool, continued: bool) -> None:
        self._messages = messages
        self._thinking = thinking
        self._continued = continued
        self._last_user = max((i for i, m in enumerate(messages) if m.role in ("user", "developer")), default=-1)
        self.ends_in_reasoning = False

    def message(self, index: int) -> Iterator[Segment]:
        """Yield the segments of one message."""
        message = self._messages[index]
        match message.role:
            case "system":
                yield Segment(message.content)
                yield from _instructions(message)
            case "user":
                yield Segment(markup.USER, True)
                yield Segment(message.content)
                yield Segment(markup.ASSISTANT + self._opening(index == self._last_user), True)
            case "developer":
                yield Segment(markup.USER, True)
                yield from _instructions(message)
                yield Segment("\n\n# The user's message is: ", True)
                yield Segment(message.content)
                yield Segment(markup.ASSISTANT + self._opening(index == self._last_user), True)
            case "assistant":
                yield from self._assistant(index, message)
            case "tool":
                yield from self._result(index, message)

    def _opening(self, here: bool) -> str:
        return markup.THINK_START if self._thinking and here else markup.THINK_END

    def _assistant(self, index: int, message: Message) -> Iterator[Segment]:
        is_open = self._continued and index == len(self._messages) - 1
        if self._thinking and index > self._last_user:
            reasoning = message.reasoning_content or ""
            if not reasoning and not message.tool_calls and not is_open:
                raise RequestError(
                    f"message {index}: an assistant message after the last user message without reasoning_content or "
                    "tool_calls, expected one of them where the model thinks"
                )
            yield Segment(reasoning)
            if is_open and not message.content:
                self.ends_in_reasoning = True
                return
            yield Segment(markup.THINK_END, True)
        yield Segment(message.content)
        if is_open:
            return
        yield from _calls(message.tool_calls)
        yield Segment(markup.EOS, True)

    def _result(self, index: int, message: Message) -> Iterator[Segment]:
        caller = index - 1
        while caller >= 0 and self._messages[caller].role == "tool":
            caller -= 1
        calls = self._messages[caller].tool_calls if caller >= 0 else ()
        number = index - caller
        if number > len(calls):
            raise RequestError(
                f"message {index}: a tool result that no tool call of the assistant message before it asks for, "
                "expected one result for each call, in their order"
            )
        if number == 1:
            yield Segment("\n\n<function_results>", True)
        yield Segment("\n<result>", True)
        yield Segment(message.content)
        yield Segment("</result>", True)
        if number == len(calls):
            yield Segment("\n</function_results>\n\n" + self._opening(index >= self._last_user), True)


def _instructions(message: Message) -> Iterator[Segment]:
    if message.tools:
        yield Segment("\n\n" + _BEFORE_SCHEMAS, True)
        yield Segment("\n".join(dumped(function, "tools") for function in message.tools))
        yield Segment(_AFTER_SCHEMAS, True)
    if message.response_format is not None:
        yield Segment("\n\n" + _RESPONSE_FORMAT, True)
        yield Segment(dumped(message.response_format, "response_format"))


def _calls(calls: Sequence[ToolCall]) -> Iterator[Segment]:
    if not calls:
        return
    before_call = f"{markup.CALLS_GAP}{markup.CALLS_START}\n"
    for call in calls:
        yield Segment(f'{before_call}{markup.INVOKE_START} name="', True)
        yield Segment(call.name)
        before_parameter = '">\n'
        for key, value in json.loads(call.arguments).items():
            kind = "true" if isinstance(value, str) else "false"
            yield Segment(f'{before_parameter}{markup.PARAMETER_START} name="', True)
            yield Segment(key)
            yield Segment(f'" string="{kind}">', True)
            yield Segment(value if isinstance(value, str) else dumped(value, "arguments"))
            yield Segment(markup.PARAMETER_END, True)
            before_parameter = "\n"
        end = f"\n{markup.INVOKE_END}"
        yield Segment(end if before_parameter == "\n" else before_parameter + end, True)
        before_call = "\n"
    yield Segment(f"\n{markup.CALLS_END}", True)
