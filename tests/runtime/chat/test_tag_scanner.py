"""Answers of GLM-5, DeepSeek-V3 and Kimi-K2: thoughts, calls in their tags, however the text was cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seekforge.runtime.chat.held_text import CHUNK
from seekforge.runtime.chat.messages import Message
from seekforge.runtime.chat.parser import ChatParser
from seekforge.runtime.chat.tag_scanner import TagScanner, TagSyntax

TOOLS = [
    {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "count": {"type": "integer"}, "any": {}},
        },
    }
]


def parse(syntax: TagSyntax, text: str, *, size: int = 1 << 20, in_reasoning: bool = False) -> Message:
    parser = ChatParser(tools=TOOLS, syntax=syntax, in_reasoning=in_reasoning)
    for start in range(0, len(text), size):
        for _ in parser.push(text[start : start + size]):
            pass
    for _ in parser.finish():
        pass
    return parser.message


def arg(key: str, value: str, gap: str = "\n") -> str:
    return f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>{gap}"


GLM = {
    "as 4.5 writes": "\n<think>why</think>\nwait\n<tool_call>find\n"
    + f"{arg('text', 'a <b> 1')}{arg('count', '3')}</tool_call>",
    "as 5 writes": "<think>why</think>wait<tool_call>find"
    + f"{arg('text', 'a <b> 1', '')}{arg('count', '3', '')}</tool_call>",
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("form", GLM)
def test_a_call_of_glm(form: str, size: int) -> None:
    message = parse("glm", GLM[form], size=size)
    assert (message.reasoning_content, message.content) == ("why", "wait")
    (call,) = message.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("find", {"text": "a <b> 1", "count": 3}) and not call.problems


def test_glm_calls_several_times_and_without_arguments() -> None:
    text = f"<tool_call>find\n</tool_call>\n<tool_call>find\n{arg('any', 'no json')}</tool_call><|observation|>"
    first, second = parse("glm", text).tool_calls
    assert first.arguments == "{}" and json.loads(second.arguments) == {"any": "no json"}
    assert not first.problems and not second.problems and parse("glm", text).content == ""


def test_a_number_that_is_none_is_said() -> None:
    (call,) = parse("glm", f"<tool_call>find\n{arg('count', 'many')}</tool_call>").tool_calls
    assert json.loads(call.arguments) == {"count": "many"} and "no JSON" in call.problems[0]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "call",
    [
        '<｜tool▁call▁begin｜>find<｜tool▁sep｜>{"text": "x", "count": 2}<｜tool▁call▁end｜>',
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{"text": "x", "count": 2}\n```<｜tool▁call▁end｜>',
    ],
)
def test_calls_of_deepseek_v3(call: str, size: int) -> None:
    text = f"why</think>wait<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    message = parse("deepseek_v3", text, size=size, in_reasoning=True)
    assert (message.reasoning_content, message.content) == ("why", "wait") and len(message.tool_calls) == 2
    for one in message.tool_calls:
        assert (one.name, json.loads(one.arguments)) == ("find", {"text": "x", "count": 2}) and not one.problems


def kimi(call_id: str, body: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{body}<|tool_call_end|>"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_of_kimi_keep_the_ids_that_the_model_gave(size: int) -> None:
    calls = kimi("functions.find:0", '{"text": "x"}') + kimi(" functions.find:1 ", '{"count": 2}')
    text = f"<think>why</think>wait<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>"
    message = parse("kimi", text, size=size)
    assert (message.reasoning_content, message.content) == ("why", "wait")
    assert [(one.id, one.name, json.loads(one.arguments)) for one in message.tool_calls] == [
        ("functions.find:0", "find", {"text": "x"}),
        ("functions.find:1", "find", {"count": 2}),
    ]
    assert not any(one.problems for one in message.tool_calls)


def test_an_id_of_kimi_that_is_none_or_there_twice_is_replaced() -> None:
    calls = kimi("find", "{}") + kimi("functions.find:0", "{}") + kimi("functions.find:0", "{}")
    first, second, third = parse("kimi", f"<|tool_calls_section_begin|>{calls}").tool_calls
    assert {one.name for one in (first, second, third)} == {"find"} and second.id == "functions.find:0"
    assert first.id.startswith("call_") and third.id.startswith("call_")


def test_a_call_that_ends_early_is_said_to() -> None:
    (call,) = parse("glm", "<tool_call>find\n<arg_key>text</arg_key>\n<arg_value>abc").tool_calls
    assert call.arguments == '{"text": "abc' and call.problems == ("the text ends inside the call",)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("glm", "x<tool_call>find\n<arg_key>te"),
        ("glm", "x<tool_call>find\n<arg_key>text</arg_key>\n<arg_va"),
        ("glm", f"x<tool_call>find\n{arg('text', 'abc')}</tool_c"),
        (
            "deepseek_v3",
            "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{}<｜tool▁call▁end｜>\n<｜tool▁c",
        ),
        ("kimi", f"x<|tool_calls_section_begin|>{kimi('functions.find:0', '{}')}\n<|tool_calls_sec"),
    ],
)
def test_a_tag_that_a_call_is_cut_off_in_is_no_content(syntax: TagSyntax, text: str, size: int) -> None:
    message = parse(syntax, text, size=size)
    assert message.content == "x" and [call.name for call in message.tool_calls] == ["find"]


@pytest.mark.parametrize(
    ("syntax", "before", "after"),
    [
        ("deepseek_v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ("glm", f"<tool_call>find\n{arg('count', '3')}", "</tool_call>"),
        ("kimi", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ],
)
def test_words_between_tags_are_the_same_however_they_are_cut(syntax: TagSyntax, before: str, after: str) -> None:
    text = f"{before}  a b {after}"
    assert {parse(syntax, text, size=size).content for size in (1, 2, 3, 1000)} == {"a b "}


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("before", ["", f"<tool_call>find\n{arg('text', 'abc')}</tool_call>"])
def test_white_space_is_waited_for_so_long_and_no_longer(before: str, size: int) -> None:
    """A model that has lost its way writes nothing else, and each step would look at all of it."""
    text = before + "\n" * 5000 + "<think>"
    scanner = TagScanner("glm", in_reasoning=False)
    spans = []
    for at in range(0, len(text), size):
        spans += scanner.push(text[at : at + size])
        assert len(scanner._held) <= 1100
    spans += scanner.finish()
    assert "".join(span.text for span in spans if span.kind == "content") == text.removeprefix(before)


def test_a_long_answer_takes_time_in_proportion_to_its_length() -> None:
    """Of what is given at once, no more than a piece is copied with each tag."""
    scanner = TagScanner("glm", in_reasoning=False)
    longest = 0
    for _ in scanner.push(GLM["as 5 writes"].removeprefix("<think>why</think>") * 500):
        longest = max(longest, len(scanner._held))
    assert longest <= CHUNK + 1100


@pytest.mark.parametrize("syntax", ["glm", "deepseek_v3"])
def test_without_tools_tags_are_content(syntax: TagSyntax) -> None:
    text = "<tool_call>find</tool_call><｜tool▁calls▁begin｜>"
    parser = ChatParser(syntax=syntax, tool_calls=False)
    for _ in (*parser.push(text), *parser.finish()):
        pass
    assert parser.message.content == text and not parser.message.tool_calls


PIECES = [
    "<think>", "</think>", "\n", " ", "a", "<", "find", "```json\n", "\n```", "{", "}", "function",
    "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|user|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>", "functions.find:0",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@example(["<｜tool▁calls▁begin｜>", "```json\n"], "deepseek_v3", 1)
@example(["<｜tool▁calls▁begin｜>", "\n```"], "deepseek_v3", 1)
@example(
    ["<tool_call>", "find", "<arg_key>", "a", "</arg_key>", "<arg_value>", "</arg_value>", "\n", "a", "\n"], "glm", 1
)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from(["glm", "deepseek_v3", "kimi"]), st.integers(1, 9)
)
def test_nothing_is_lost_however_the_text_is_cut(pieces: list[str], syntax: TagSyntax, size: int) -> None:
    text = "".join(pieces)
    scanner = TagScanner(syntax, in_reasoning=False)
    spans = [span for at in range(0, len(text), size) for span in scanner.push(text[at : at + size])]
    spans += scanner.finish()
    assert "".join(span.text for span in spans) == text
    whole, cut = parse(syntax, text), parse(syntax, text, size=size)
    assert (whole.content, whole.reasoning_content) == (cut.content, cut.reasoning_content)
    assert [(one.name, one.arguments) for one in whole.tool_calls] == [
        (one.name, one.arguments) for one in cut.tool_calls
    ]
