"""Chat encoding of DeepSeek-V3.2: messages to a prompt, and a completion back to a message.

This file stands alone (standard library only) and travels inside a checkpoint as
`encoding/encoding_dsv32.py`, with the two functions that the released folder's file of that name offers.
Departure: earlier developer messages are kept. Dropping them there shifts the message indices and breaks the
rendering of what follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

ThinkingMode = Literal["chat", "thinking"]
Message = Mapping[str, Any]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
DSML = "｜DSML｜"

_CALLS_START = f"\n\n<{DSML}function_calls"
_CALLS_END = f"</{DSML}function_calls>"
_INVOKE = re.compile(rf'<{DSML}invoke name="([^"]*)">\n')
_INVOKE_END = f"</{DSML}invoke"
_PARAMETER = re.compile(rf'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>\n', re.DOTALL)

# The wording is part of the model: DeepSeek-V3.2, encoding/encoding_dsv32.py, Copyright (c) 2023 DeepSeek,
# MIT license. Byte for byte, line ends included.
TOOLS_TEMPLATE = """\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml_token}function_calls>" block like the following as part of your reply to the user:
<{dsml_token}function_calls>
<{dsml_token}invoke name="$FUNCTION_NAME">
<{dsml_token}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml_token}parameter>
...
</{dsml_token}invoke>
<{dsml_token}invoke name="$FUNCTION_NAME2">
...
</{dsml_token}invoke>
</{dsml_token}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<{dsml_token}function_calls>
...
</{dsml_token}function_calls>

<function_results>
...
</function_results>

{thinking_start_token}...thinking about results{thinking_end_token}

Here are the functions available in JSONSchema format:
<functions>
{tool_schemas}
</functions>
"""  # noqa: E501

_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: ThinkingMode,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
) -> str:
    """Render `messages` as the prompt text that the model continues.

    Args:
        messages: OpenAI-style messages (role, content, tools, tool_calls, reasoning_content, response_format).
        thinking_mode: "thinking" lets the model reason after the last user message, "chat" does not.
        context: messages rendered before, to which `messages` are appended; not rendered again.
        drop_thinking: accepted for compatibility. Reasoning before the last user message is never rendered.
        add_default_bos_token: begin with BOS when there is no context.

    Returns:
        The prompt. BOS is part of it: encode it without adding special tokens.

    Raises:
        ValueError: an unknown thinking mode or role, or a message that cannot stand where it does.
    """
    if thinking_mode not in ("chat", "thinking"):
        raise ValueError(f"thinking_mode is {thinking_mode!r}, expected 'chat' or 'thinking'")
    earlier = list(context or [])
    full = [*earlier, *messages]
    last_user = max((i for i, message in enumerate(full) if message.get("role") in ("user", "developer")), default=-1)
    parts = [BOS] if add_default_bos_token and not earlier else []
    parts += [_render(i, full, thinking_mode, last_user) for i in range(len(earlier), len(full))]
    return "".join(parts)


def parse_message_from_completion_text(text: str, thinking_mode: ThinkingMode) -> dict[str, Any]:
    """Read a completion, end-of-sentence included, as an assistant message. Strict: well-formed text only.

    Args:
        text: everything the model produced after the prompt.
        thinking_mode: the mode of the prompt.

    Returns:
        role, content, reasoning_content and tool_calls (OpenAI form, arguments as a JSON string).

    Raises:
        ValueError: the text is not a complete, well-formed message.
    """
    reasoning, rest = "", text
    if thinking_mode == "thinking":
        reasoning, closed, rest = text.partition(THINK_CLOSE)
        if not closed or _CALLS_START in reasoning:
            raise ValueError("completion: no </think> before the answer, expected reasoning first in thinking mode")
    ends = [position for position in (rest.find(EOS), rest.find(_CALLS_START)) if position >= 0]
    if not ends:
        raise ValueError("completion: has no end-of-sentence token, expected a finished message")
    content, rest = rest[: min(ends)], rest[min(ends) :]
    tool_calls: list[dict[str, Any]] = []
    if rest.startswith(_CALLS_START):
        tool_calls, rest = _parse_calls(rest.removeprefix(_CALLS_START))
    if rest != EOS:
        raise ValueError(f"completion: {_shorten(rest)!r} follows the message, expected only end-of-sentence")
    for name, value in (("reasoning", reasoning), ("content", content)):
        for token in (BOS, EOS, THINK_OPEN, THINK_CLOSE, DSML):
            if token in value:
                raise ValueError(f"completion: {name} contains {token!r}, expected plain text")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


# --- rendering ----------------------------------------------------------------------------------------------


def _render(index: int, full: Sequence[Message], mode: ThinkingMode, last_user: int) -> str:
    message = full[index]
    role, content = message.get("role"), _text(message)
    if role == "system":
        return content + _instructions(message)
    if role == "user":
        return USER + content + ASSISTANT + _think(mode, index == last_user)
    if role == "developer":
        if not content:
            raise ValueError(f"message {index}: a developer message without content, expected text")
        body = f"{_instructions(message)}\n\n# The user's message is: {content}"
        return USER + body + ASSISTANT + _think(mode, index == last_user)
    if role == "assistant":
        return _render_assistant(index, message, mode, last_user)
    if role == "tool":
        return _render_tool(index, full, mode, last_user)
    raise ValueError(f"message {index}: role is {role!r}, expected system, developer, user, assistant or tool")


def _render_assistant(index: int, message: Message, mode: ThinkingMode, last_user: int) -> str:
    reasoning, calls = message.get("reasoning_content") or "", message.get("tool_calls") or []
    thinking = ""
    if mode == "thinking" and index > last_user:
        if not reasoning and not calls:
            raise ValueError(
                f"message {index}: an assistant turn after the last user message without reasoning_content or "
                "tool_calls, expected one of them in thinking mode"
            )
        thinking = reasoning + THINK_CLOSE
    return thinking + _text(message) + _render_calls(calls) + EOS


def _render_tool(index: int, full: Sequence[Message], mode: ThinkingMode, last_user: int) -> str:
    asked = index - 1
    while asked >= 0 and full[asked].get("role") == "tool":
        asked -= 1
    calls = full[asked].get("tool_calls") if asked >= 0 and full[asked].get("role") == "assistant" else None
    order = index - asked
    if not calls or order > len(calls):
        raise ValueError(
            f"message {index}: a tool result that no tool call of the assistant turn before it asked for, "
            "expected one result per call, in order"
        )
    text = "\n\n<function_results>" if order == 1 else ""
    text += f"\n<result>{_text(full[index])}</result>"
    if order == len(calls):
        text += "\n</function_results>\n\n" + _think(mode, index >= last_user)
    return text


def _text(message: Message) -> str:
    """Return the text of a message, also when its content is a list of text parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _think(mode: ThinkingMode, here: bool) -> str:
    return THINK_OPEN if mode == "thinking" and here else THINK_CLOSE


def _instructions(message: Message) -> str:
    text = ""
    if message.get("tools"):
        schemas = "\n".join(_dumps(tool.get("function", tool)) for tool in message["tools"])
        text += "\n\n" + TOOLS_TEMPLATE.format(
            dsml_token=DSML, thinking_start_token=THINK_OPEN, thinking_end_token=THINK_CLOSE, tool_schemas=schemas
        )
    if message.get("response_format"):
        text += "\n\n" + _RESPONSE_FORMAT + _dumps(message["response_format"])
    return text


def _render_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return ""
    invokes = "\n".join(_render_invoke(call.get("function", call)) for call in calls)
    return f"{_CALLS_START}>\n{invokes}\n{_CALLS_END}"


def _render_invoke(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    try:
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise ValueError(f"tool call {function.get('name')!r}: arguments are not JSON ({error})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"tool call {function.get('name')!r}: arguments are not a JSON object")
    parameters = "\n".join(
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _dumps(value)}</{DSML}parameter>"
        for key, value in values.items()
    )
    return f'<{DSML}invoke name="{function["name"]}">\n{parameters}\n{_INVOKE_END}>'


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- parsing ------------------------------------------------------------------------------------------------


def _parse_calls(text: str) -> tuple[list[dict[str, Any]], str]:
    """Read what follows the opening of a function_calls block; return the calls and the text after the block."""
    calls: list[dict[str, Any]] = []
    while True:
        if not text.startswith(">\n"):
            raise ValueError(f"completion: {_shorten(text)!r} in a function_calls block, expected '>' and a new line")
        text = text[2:]
        if text.startswith(_CALLS_END):
            return calls, text.removeprefix(_CALLS_END)
        head = _INVOKE.match(text)
        if head is None:
            raise ValueError(f"completion: {_shorten(text)!r} in a function_calls block, expected an invoke element")
        arguments, text = _parse_parameters(text[head.end() :])
        calls.append({"type": "function", "function": {"name": head.group(1), "arguments": arguments}})


def _parse_parameters(text: str) -> tuple[str, str]:
    """Read the parameters of one invoke; return its arguments as JSON and the text after '</｜DSML｜invoke'."""
    values: dict[str, str] = {}
    while (parameter := _PARAMETER.match(text)) is not None:
        key, is_string, value = parameter.groups()
        if key in values:
            raise ValueError(f"completion: parameter {key!r} is given twice, expected once")
        values[key] = _dumps(value) if is_string == "true" else value
        text = text[parameter.end() :]
    if not values:  # a call without parameters is rendered with one empty line
        text = text.removeprefix("\n")
    if not text.startswith(_INVOKE_END):
        raise ValueError(f"completion: {_shorten(text)!r} in an invoke element, expected a parameter or its end")
    body = ", ".join(f"{_dumps(key)}: {value}" for key, value in values.items())
    return "{" + body + "}", text.removeprefix(_INVOKE_END)


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
