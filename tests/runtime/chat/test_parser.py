"""From completions to messages: what is well-formed, and what is not (spec §8.4)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from seekforge.runtime.chat import ChatParser, Message, encode
from seekforge.runtime.chat.markup import ASSISTANT, EOS, USER

TOOLS = [
    {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "share": {"type": "number"},
                "maybe": {"type": ["boolean", "null"]},
                "rows": {"type": "array"},
                "any": {},
            },
        },
    }
]


def parameter(name: str, value: str, string: str | None) -> str:
    kind = "" if string is None else f' string="{string}"'
    return f'<｜DSML｜parameter name="{name}"{kind}>{value}</｜DSML｜parameter>\n'


def call(*parameters: str, name: str = "f") -> str:
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parameters)}</｜DSML｜invoke>\n'


def block(*calls: str) -> str:
    return f"\n\n<｜DSML｜function_calls>\n{''.join(calls)}</｜DSML｜function_calls>"


def parse(text: str, **options: Any) -> Message:
    parser = ChatParser(tools=TOOLS, **options)
    for _ in (*parser.push(text), *parser.finish()):
        pass
    return parser.message


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "turn",
    [
        {"content": "4"},
        {"content": "", "tool_calls": [("f", {"text": "x\ny </b> <｜DSML｜", "count": 1})]},
        {"content": "wait", "tool_calls": [("f", {}), ("f", {"rows": [1, {"a": "é"}], "maybe": None})]},
    ],
)
def test_parsing_undoes_encoding(turn: dict[str, Any], thinking: bool) -> None:
    calls = [{"function": {"name": name, "arguments": values}} for name, values in turn.get("tool_calls", ())]
    message = {"role": "assistant", "content": turn["content"], "tool_calls": calls, "reasoning_content": "why"}
    before = [{"role": "user", "content": "q"}]
    prompt = encode(before, thinking=thinking)
    completion = encode([*before, message], thinking=thinking).text.removeprefix(prompt.text)
    parsed = parse(completion, in_reasoning=prompt.in_reasoning)
    assert parsed.content == turn["content"] and parsed.reasoning_content == ("why" if thinking else None)
    read = [(one.name, json.loads(one.arguments)) for one in parsed.tool_calls]
    assert read == turn.get("tool_calls", []) and not any(one.problems for one in parsed.tool_calls)
    again = encode([*before, parsed, *[{"role": "tool", "content": "r"} for _ in calls]], thinking=thinking)
    assert again.text.startswith(prompt.text + completion)


def test_text_arguments_are_given_out_before_they_end() -> None:
    parser = ChatParser(tools=TOOLS)
    text = block(call(parameter("text", 'a "quoted" line\nand more', "true")))
    stop = text.index("and more")
    before = [delta for char in text[:stop] for delta in parser.push(char)]
    calls = [one for delta in before for one in delta.tool_calls]
    assert calls[0].name == "f" and calls[0].id and calls[0].index == 0
    assert "".join(one.arguments for one in calls) == '{"text": "a \\"quoted\\" line\\n'


@pytest.mark.parametrize(
    ("name", "value", "string", "expected", "problem"),
    [
        ("text", "7", "true", '"7"', None),
        ("count", "7", "true", '"7"', None),
        ("count", "7", "false", "7", None),
        ("count", "7.0", "false", "7.0", None),
        ("count", "7.5", "false", '"7.5"', "not of type integer"),
        ("count", "seven", "false", '"seven"', "no JSON"),
        ("count", '"7"', "false", '"7"', "not of type integer"),
        ("count", "true", "false", '"true"', "not of type integer"),
        ("share", "1e5", "false", "1e5", None),
        ("share", "NaN", "false", '"NaN"', "no JSON"),
        ("text", "7", "false", '"7"', "not of type string"),
        ("text", "plain", None, '"plain"', None),
        ("maybe", "null", "false", "null", None),
        ("maybe", "True", "false", '"True"', "no JSON"),
        ("rows", "[1, 2", "false", '"[1, 2"', "no JSON"),
        ("rows", "[" * 100_000, "false", json.dumps("[" * 100_000), "no JSON"),
        ("rows", "[1,\n2]", "false", "[1,\n2]", None),
        ("any", '{"a": 1}', "false", '{"a": 1}', None),
        ("any", "free", None, '"free"', "no JSON"),
        ("unknown", "1", "false", "1", None),
        (
            "text",
            "</b><｜DSML｜invoke name='x'>\u2028",
            "true",
            json.dumps("</b><｜DSML｜invoke name='x'>\u2028", ensure_ascii=False),
            None,
        ),
    ],
)
def test_a_value_is_text_or_json_of_the_schema_and_else_text_with_the_reason(
    name: str, value: str, string: str | None, expected: str, problem: str | None
) -> None:
    (read,) = parse(block(call(parameter(name, value, string)))).tool_calls
    assert read.arguments == f'{{"{name}": {expected}}}'
    assert (problem in "".join(read.problems)) if problem else not read.problems


@pytest.mark.parametrize("lost", ["\n\n<｜DSML｜function_calls>\n", "</｜DSML｜invoke>\n", "</｜DSML｜function_calls>"])
def test_a_tag_that_is_missing_loses_no_call(lost: str) -> None:
    text = "Hi" + block(call(parameter("count", "1", "false")), call(name="g"))
    message = parse(text.replace(lost, ""))
    assert [one.name for one in message.tool_calls] == ["f", "g"] and message.content == "Hi"
    assert [one.arguments for one in message.tool_calls] == ['{"count": 1}', "{}"]
    assert "there is no tool 'g'" in message.tool_calls[1].problems


def test_a_body_of_json_is_the_arguments() -> None:
    (read,) = parse(block(call('{"count": [1, "</b>"]}\n'))).tool_calls
    assert json.loads(read.arguments) == {"count": [1, "</b>"]} and not read.problems
    (read,) = parse(block(call("{oops\n"))).tool_calls
    assert read.arguments == "{oops\n" and "no JSON object" in read.problems[0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('a<｜DSML｜invoke nam="x">b', 'a<｜DSML｜invoke nam="x">b'),
        ("a<｜DSML｜invoke", "a<｜DSML｜invoke"),
        ("a\n\n<｜DSML｜function_cal", "a\n\n<｜DSML｜function_cal"),
        ("a\n\n<｜DSML｜function_calls>junk</｜DSML｜function_calls>b", "ajunkb"),
        (block("<｜DSML｜parameter name='x'>", call()), "<｜DSML｜parameter name='x'>"),
        (f"a{EOS}", "a"),
        ("<think>a</think>b", "<think>a</think>b"),
        (f"a{USER}b{ASSISTANT}", f"a{USER}b{ASSISTANT}"),
        ("a\n\n", "a\n\n"),
    ],
)
def test_what_is_no_call_is_content(text: str, content: str) -> None:
    assert parse(text).content == content


def test_a_thought_that_does_not_end_is_all_there_is() -> None:
    message = parse("Hm <｜DSML｜function_calls>\n </thin", in_reasoning=True)
    assert message.reasoning_content == "Hm <｜DSML｜function_calls>\n </thin"
    assert message.content == "" and not message.tool_calls


@pytest.mark.parametrize("size", range(1, 150, 7))
def test_a_text_that_ends_early_adds_nothing(size: int) -> None:
    text = block(call(parameter("text", "some words", "true"), parameter("rows", "[1, 2]", "false")))
    whole, cut = parse(text).tool_calls[0], parse(text[:size]).tool_calls
    if cut:
        assert whole.arguments.startswith(cut[0].arguments.rstrip("}")) or "<" in cut[0].arguments
        assert cut[0].problems == ("the text ends inside the call",) or "the text ends inside a tag" in cut[0].problems


def test_a_repeated_argument_is_told() -> None:
    (read,) = parse(block(call(parameter("count", "1", "false"), parameter("count", "2", "false")))).tool_calls
    assert json.loads(read.arguments) == {"count": 2} and "is there twice" in read.problems[0]
