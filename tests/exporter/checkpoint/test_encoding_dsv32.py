"""The chat encoder against the released golden conversation and the rules of spec §8."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from seekforge.exporter.checkpoint import encoding_dsv32
from seekforge.exporter.checkpoint.encoding_dsv32 import (
    ASSISTANT,
    BOS,
    EOS,
    TOOLS_TEMPLATE,
    USER,
    encode_messages,
    parse_message_from_completion_text,
)

DATA = Path(__file__).parents[2] / "data" / "chat"


def conversation() -> list[dict[str, Any]]:
    raw = json.loads((DATA / "tool_conversation.json").read_text(encoding="utf-8"))
    raw["messages"][0]["tools"] = raw["tools"]
    return raw["messages"]


def golden() -> str:
    return (DATA / "tool_conversation.txt").read_bytes().decode()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# --- encoding -----------------------------------------------------------------------------------------------


def test_tools_preamble_is_the_released_text() -> None:
    assert (DATA / "tools_preamble.txt").read_bytes().decode() == TOOLS_TEMPLATE
    assert len(TOOLS_TEMPLATE) == 1210
    assert sha256(TOOLS_TEMPLATE) == "0cc91e644b79c4f576bbe968ed31a1bc8f825c0a4617730109df29d07f75f79a"
    rendered = encode_messages([{"role": "system", "tools": [{"function": {"name": "f"}}]}], "chat")
    before = rendered[rendered.index("## Tools") : rendered.index('{"name": "f"}')]
    assert len(before) == 1089
    assert sha256(before) == "963a72ee9be43f07d21bec2348ed2d7e45185e4b502f2a4da35a540299dc2b03"


def test_golden_conversation_byte_for_byte() -> None:
    assert encode_messages(conversation(), "thinking") == golden()


@pytest.mark.parametrize("split", range(1, 11))
def test_context_and_messages_make_the_same_whole(split: int) -> None:
    messages = conversation()
    rest = encode_messages(messages[split:], "thinking", context=messages[:split])
    assert rest and golden().endswith(rest)


def test_known_answer_of_the_model_card() -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
        {"role": "user", "content": "1+1=?"},
    ]
    assert encode_messages(messages, "thinking") == (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    assert encode_messages(messages, "chat").endswith("<｜User｜>1+1=?<｜Assistant｜></think>")


def test_bos_can_be_left_out() -> None:
    user = [{"role": "user", "content": "x"}]
    assert encode_messages(user, "chat", add_default_bos_token=False) == encode_messages(user, "chat").removeprefix(BOS)


def test_developer_messages_are_kept_and_open_thinking() -> None:
    messages = [
        {"role": "developer", "content": "search"},
        {"role": "assistant", "content": "found", "reasoning_content": "r"},
        {"role": "user", "content": "more"},
    ]
    assert encode_messages(messages, "thinking") == (
        f"{BOS}{USER}\n\n# The user's message is: search{ASSISTANT}</think>found{EOS}{USER}more{ASSISTANT}<think>"
    )
    assert encode_messages(messages[:1], "thinking").endswith(f"search{ASSISTANT}<think>")


def test_response_format_follows_the_content() -> None:
    text = encode_messages([{"role": "system", "content": "s", "response_format": {"type": "object", "名": 1}}], "chat")
    assert text.startswith(f"{BOS}s\n\n## Response Format:\n\n")
    assert text.endswith('\n{"type": "object", "名": 1}')


def test_values_that_are_not_strings_are_compact_json() -> None:
    arguments = '{"n": 1.5, "l": [1, "é"], "b": true, "z": null, "s": "<raw> \\"text\\""}'
    text = encode_messages([{"role": "assistant", "tool_calls": [call("f", arguments)]}], "chat")
    for fragment in (
        'name="n" string="false">1.5<',
        'name="l" string="false">[1, "é"]<',
        'name="b" string="false">true<',
        'name="z" string="false">null<',
        'name="s" string="true"><raw> "text"<',
    ):
        assert fragment in text


def test_content_may_be_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode_messages([{"role": "user", "content": parts}], "chat") == f"{BOS}{USER}ab{ASSISTANT}</think>"


CALLED = {"role": "assistant", "tool_calls": [call("f", "{}")]}
RESULT = {"role": "tool", "content": "r"}


@pytest.mark.parametrize(
    ("messages", "mode", "message"),
    [
        ([{"role": "user", "content": "x"}], "fast", "thinking_mode is 'fast'"),
        ([{"role": "robot"}], "chat", "role is 'robot'"),
        ([RESULT], "chat", "no tool call"),
        ([{"role": "user", "content": "x"}, RESULT], "chat", "no tool call"),
        ([CALLED, RESULT, RESULT], "chat", "message 2: a tool result that no tool call"),
        ([{"role": "assistant", "content": "x"}], "thinking", "without reasoning_content or tool_calls"),
        ([{"role": "developer"}], "chat", "developer message without content"),
        ([{"role": "assistant", "tool_calls": [call("f", "{")]}], "chat", "arguments are not JSON"),
        ([{"role": "assistant", "tool_calls": [call("f", "[]")]}], "chat", "not a JSON object"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(messages: list[Any], mode: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_messages(messages, mode)


# --- parsing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"content": "4", "reasoning_content": "2+2", "tool_calls": []},
        {"content": "", "reasoning_content": "r", "tool_calls": [call("f", '{"a": "x\\ny", "n": 1}')]},
        {"content": "wait", "reasoning_content": "r", "tool_calls": [call("f", "{}"), call("g", '{"l": [1, {}]}')]},
    ],
)
@pytest.mark.parametrize("mode", ["thinking", "chat"])
def test_parsing_undoes_encoding(message: dict[str, Any], mode: Any) -> None:
    message = {"role": "assistant", **message}
    if mode == "chat":
        message["reasoning_content"] = ""
    context = [{"role": "user", "content": "q"}]
    completion = encode_messages([message], mode, context=context)
    assert parse_message_from_completion_text(completion, mode) == message


BLOCK = '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{}</｜DSML｜invoke>\n</｜DSML｜function_calls>'
PARAMETER = '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n'


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("hello", "chat", "no end-of-sentence"),
        ("hello" + EOS, "thinking", "no </think>"),
        ("\n\n" + BLOCK.format("") + "</think>" + EOS, "thinking", "no </think>"),
        ("hello" + EOS + "more", "chat", "follows the message"),
        ("a<think>b" + EOS, "chat", "content contains '<think>'"),
        ("a<think>b</think>c" + EOS, "thinking", "reasoning contains '<think>'"),
        ("\n\n" + BLOCK.format(PARAMETER * 2) + EOS, "chat", "given twice"),
        ("\n\n" + BLOCK.format("junk") + EOS, "chat", "expected a parameter or its end"),
        ("\n\n" + BLOCK.format("") + "tail" + EOS, "chat", "'tail"),
        ("\n\n<｜DSML｜function_calls>junk" + EOS, "chat", "expected '>' and a new line"),
        ("\n\n<｜DSML｜function_calls>\njunk" + EOS, "chat", "expected an invoke"),
        ("\n\n" + BLOCK.format("")[:-5] + EOS, "chat", "expected an invoke"),
    ],
)
def test_malformed_completions_are_refused(text: str, mode: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_message_from_completion_text(text, mode)


def test_it_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(encoding_dsv32.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported if name} <= sys.stdlib_module_names
