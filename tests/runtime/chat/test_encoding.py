"""The encoding against the released golden conversation and the rules of spec §8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import RequestError
from seekforge.formats.checkpoint.tools_preamble import TOOLS_PREAMBLE
from seekforge.runtime.chat import encode
from seekforge.runtime.chat.markup import ASSISTANT, BOS, EOS, USER

DATA = Path(__file__).parents[2] / "data" / "chat"
RAW = json.loads((DATA / "tool_conversation.json").read_text(encoding="utf-8"))
GOLDEN = (DATA / "tool_conversation.txt").read_bytes().decode()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def text_of(*messages: dict[str, Any], **options: Any) -> str:
    return encode(messages, **options).text


# --- golden -------------------------------------------------------------------------------------------------


def test_the_golden_conversation_byte_for_byte() -> None:
    assert encode(RAW["messages"], tools=RAW["tools"], thinking=True).text == GOLDEN


def test_tools_of_the_request_stand_where_those_of_its_system_message_do() -> None:
    first = RAW["messages"][0] | {"tools": RAW["tools"]}
    assert encode([first, *RAW["messages"][1:]], thinking=True).text == GOLDEN
    without = encode(RAW["messages"][1:3], tools=RAW["tools"]).text
    assert without.startswith(f"{BOS}\n\n## Tools\n\n")
    with pytest.raises(RequestError, match="both have tools"):
        encode([first], tools=RAW["tools"])


@pytest.mark.parametrize("end", [i for i, m in enumerate(RAW["messages"], 1) if m["role"] in ("user", "tool")])
def test_a_tool_loop_extends_its_prompt_and_a_user_message_reopens_it(end: int) -> None:
    """Reasoning is kept while tools answer, and dropped when a user speaks: then the prefix ends before the thought."""
    text = encode(RAW["messages"][:end], tools=RAW["tools"], thinking=True).text
    if end > max(i for i, m in enumerate(RAW["messages"]) if m["role"] == "user"):
        assert GOLDEN.startswith(text)
    assert text.endswith(("<think>", "</result>"))
    dropped = RAW["messages"][2]["reasoning_content"] not in text
    assert dropped == (RAW["messages"][end - 1]["role"] == "user" or end > 9 or end < 3)


def test_the_known_answer_of_the_model_card() -> None:
    messages = [
        user("hello"),
        {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
        user("1+1=?"),
    ]
    assert text_of(*messages, thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    assert text_of(*messages).endswith("<｜User｜>1+1=?<｜Assistant｜></think>")


def test_the_preamble_is_the_released_text() -> None:
    assert (DATA / "tools_preamble.txt").read_bytes().decode() == TOOLS_PREAMBLE


# --- rules --------------------------------------------------------------------------------------------------


def test_developer_messages_are_kept_and_open_a_thought() -> None:
    messages = [
        {"role": "developer", "content": "search"},
        {"role": "assistant", "content": "found", "reasoning_content": "r"},
        user("more"),
    ]
    assert text_of(*messages, thinking=True) == (
        f"{BOS}{USER}\n\n# The user's message is: search{ASSISTANT}</think>found{EOS}{USER}more{ASSISTANT}<think>"
    )
    tools = [{"function": {"name": "f"}}]
    text = text_of({"role": "developer", "content": "x", "tools": tools, "response_format": {"type": "object"}})
    assert text.startswith(f"{BOS}{USER}\n\n## Tools") and '{"name": "f"}\n</functions>\n\n\n## Response' in text


def test_a_response_format_follows_the_content() -> None:
    schema = {"type": "object", "名": 1}
    text = text_of({"role": "system", "content": "s"}, user("x"), response_format=schema)
    assert text.startswith(f"{BOS}s\n\n## Response Format:\n\n")
    assert f'\n{{"type": "object", "名": 1}}{USER}x' in text
    assert text == text_of({"role": "system", "content": "s", "response_format": schema}, user("x"))


def test_values_that_are_no_text_are_compact_json() -> None:
    arguments = '{"n": 1.5, "l": [1, "é"], "b": true, "z": null, "s": "<raw> \\"text\\""}'
    for values in (arguments, json.loads(arguments)):
        text = text_of({"role": "assistant", "tool_calls": [call("f", values)]})
        for fragment in (
            'name="n" string="false">1.5<',
            'name="l" string="false">[1, "é"]<',
            'name="b" string="false">true<',
            'name="z" string="false">null<',
            'name="s" string="true"><raw> "text"<',
        ):
            assert fragment in text
    assert '"f">\n\n</｜DSML｜invoke>' in text_of({"role": "assistant", "tool_calls": [call("f", "{}")]})


def test_reasoning_has_two_names_and_a_content_may_be_parts() -> None:
    turn = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    texts = [text_of(user("x"), turn | {key: "why"}, thinking=True) for key in ("reasoning", "reasoning_content")]
    assert texts[0] == texts[1] == f"{BOS}{USER}x{ASSISTANT}<think>why</think>ab{EOS}"


def test_results_stand_in_the_order_of_their_calls_if_they_say_which_they_are_of() -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": "{}"}}
    ask = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call | {"id": "a"}, call | {"id": "b"}]},
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    assert "<result>of a</result>\n<result>of b</result>" in encode([*ask, *results]).text
    nameless = [{"role": "tool", "content": f"of {name}"} for name in ("b", "a")]
    assert "<result>of b</result>\n<result>of a</result>" in encode([*ask, *nameless]).text


@pytest.mark.parametrize("thinking", [False, True])
def test_the_last_message_is_continued(thinking: bool) -> None:
    opening = "<think>why</think>" if thinking else "</think>"
    turn = {"role": "assistant", "content": "The answer", "reasoning_content": "why"}
    prompt = encode([user("x"), turn], thinking=thinking, continue_final_message=True)
    assert prompt.text == f"{BOS}{USER}x{ASSISTANT}{opening}The answer" and not prompt.in_reasoning
    thought = {"role": "assistant", "reasoning_content": "Let me"}
    prompt = encode([user("x"), thought], thinking=thinking, continue_final_message=True)
    assert prompt.text.endswith("<think>Let me" if thinking else "</think>") and prompt.in_reasoning == thinking


def test_nothing_is_opened_where_no_answer_is_wanted() -> None:
    assert text_of(user("x"), add_generation_prompt=False) == f"{BOS}{USER}x"
    whole = encode(RAW["messages"][:4], tools=RAW["tools"], thinking=True).text
    cut = encode(RAW["messages"][:4], tools=RAW["tools"], thinking=True, add_generation_prompt=False).text
    assert whole == cut + "<think>" and cut.endswith("</function_results>\n\n")
    assert encode([user("x")], thinking=True).in_reasoning and not encode([user("x")]).in_reasoning


CALLED = {"role": "assistant", "tool_calls": [call("f", "{}")]}
RESULT = {"role": "tool", "content": "r"}


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "no messages"),
        ("hello", {}, "expected a list of messages"),
        ({"role": "user"}, {}, "expected a list of messages"),
        (["hello"], {}, "message 0 is 'hello'"),
        ([{"role": "robot"}], {}, "role is 'robot', expected system, developer"),
        ([{"role": ["user"]}], {}, "role is"),
        ([RESULT], {}, "no tool call"),
        ([user("x"), RESULT], {}, "no tool call"),
        ([CALLED, RESULT, RESULT], {}, "message 2: a tool result that no tool call"),
        ([{"role": "assistant", "content": "x"}], {"thinking": True}, "without reasoning_content or tool_calls"),
        ([{"role": "developer"}], {}, "developer message without content"),
        ([{"role": "user"}], {}, "user message without content"),
        ([{"role": "user", "content": 7}], {}, "content is 7"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "a part of its content"),
        ([{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}], {}, "expected one of them"),
        ([{"role": "assistant", "function_call": {}}], {}, "use tool_calls"),
        ([{"role": "assistant", "tool_calls": {}}], {}, "expected a list of calls"),
        ([{"role": "assistant", "tool_calls": [7]}], {}, "tool call 0 is 7"),
        ([{"role": "assistant", "tool_calls": [call("f", "{")]}], {}, "arguments are not JSON"),
        ([{"role": "assistant", "tool_calls": [call("f", "[" * 99_999)]}], {}, "arguments are not JSON"),
        ([{"role": "assistant", "tool_calls": [call("f", "[]")]}], {}, "expected a JSON object"),
        ([{"role": "assistant", "tool_calls": [call('f">', "{}")]}], {}, "without quotation marks"),
        ([{"role": "assistant", "tool_calls": [call("f", {'"': 1})]}], {}, "name of an argument"),
        ([user("x")], {"tools": {}}, "tools is {}"),
        ([user("x")], {"tools": [7]}, "entry 0 is 7"),
        ([user("x")], {"tools": [{"function": {}}]}, "its name is None"),
        ([user("x")], {"tools": [{"name": "f", "parameters": []}]}, "expected a JSON schema"),
        ([user("x")], {"tools": [{"name": "f"}, {"name": "f"}]}, "two functions called 'f'"),
        ([user("x")], {"tools": [{"name": "f", "x": float("nan")}]}, "cannot be written as JSON"),
        ([user("x")], {"response_format": {1j}}, "cannot be written as JSON"),
        ([user("x")], {"continue_final_message": True}, "the last one is of user"),
        ([CALLED], {"continue_final_message": True}, "ends in tool calls"),
    ],
)
def test_messages_that_cannot_stand_are_one_line(messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        encode(messages, **options)
    assert "\n" not in str(caught.value)
