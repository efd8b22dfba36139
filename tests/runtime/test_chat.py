"""Conversations through `LLM` and `AsyncLLM`, on the toy engine with the tokens of DeepSeek-V3.2's conversations."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.toy_engine import write_chat_engine

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from seekforge.runtime.chat import Message, encode

DOCS = Path(__file__).parents[2] / "docs" / "chat.md"
HOT = SamplingParams(temperature=2.0, seed=7, max_tokens=24)
USER = [{"role": "user", "content": "the cat"}]
THINKING: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "sum",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "unit": {"enum": ["m", "s"]}},
                "required": ["a", "unit"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def llm(chat_engine: Path) -> Iterator[LLM]:
    with LLM(chat_engine, num_blocks=60) as llm:
        yield llm


def idle(llm: LLM) -> bool:
    metrics = llm.metrics()
    return metrics.num_running == metrics.num_waiting == 0


def test_an_answer_is_a_message(llm: LLM) -> None:
    (output,) = llm.chat(USER, HOT)
    prompt = encode(USER)
    assert output.prompt == prompt.text
    assert list(output.prompt_token_ids) == llm.get_tokenizer().encode(prompt.text)
    (one,) = output.outputs
    assert one.message == Message("assistant", one.text)
    assert one.token_ids == llm.generate(prompt.text, HOT)[0].outputs[0].token_ids


def test_several_conversations_are_answered_in_their_order(llm: LLM) -> None:
    both = [USER, [Message("user", "a mat")]]
    outputs = llm.chat(both, [HOT, replace(HOT, n=2)])
    assert [output.prompt for output in outputs] == [encode(one).text for one in both]
    assert [len(output.outputs) for output in outputs] == [1, 2]
    assert outputs[0].outputs[0].message == llm.chat(USER, HOT)[0].outputs[0].message
    with pytest.raises(RequestError, match="conversation 1: the conversation has no messages"):
        llm.chat([USER, []], HOT)


def test_without_parameters_an_answer_may_use_the_rest_of_the_context(llm: LLM) -> None:
    request = llm.chat_request(USER)
    assert request.params == replace(llm.default_sampling_params, max_tokens=None)


@pytest.mark.parametrize("budget", [0, 5])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_thought_ends_where_its_budget_does(chat_engine: Path, budget: int, n: int, drafts: int) -> None:
    with LLM(chat_engine, num_blocks=60, num_speculative_tokens=drafts, speculation_off_switch=False) as llm:
        end = llm.get_tokenizer().token_id("</think>")
        for temperature in (0.0, 2.0):
            params = SamplingParams(
                temperature=temperature, seed=3, n=n, max_tokens=16, ignore_eos=True, thinking_token_budget=budget
            )
            (output,) = llm.chat(USER, params, **THINKING)
            for one in output.outputs:
                assert one.token_ids.index(end) <= budget and len(one.token_ids) == 16
                assert one.message is not None and one.message.reasoning_content is not None
                assert one.message.reasoning_content + "</think>" + one.message.content == one.text
            free = llm.chat(USER, replace(params, thinking_token_budget=-1), **THINKING)[0].outputs
            for one, other in zip(output.outputs, free, strict=True):
                assert one.token_ids[: one.token_ids.index(end)] == other.token_ids[: one.token_ids.index(end)]
            assert not llm.chat(USER, params)[0].outputs[0].token_ids.count(end) or temperature


def test_a_budget_counts_a_thought_that_the_prompt_left_open(llm: LLM) -> None:
    end = llm.get_tokenizer().token_id("</think>")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, thinking_token_budget=6, logprobs=1)
    (one,) = llm.generate("<think>the", params)[0].outputs
    known = len(llm.get_tokenizer().encode("the"))
    assert one.token_ids.index(end) == 6 - known
    assert one.logprobs is not None and one.logprobs[6 - known].token_id == end
    assert end not in llm.generate("<think>the</think>", params)[0].outputs[0].token_ids


def test_a_budget_is_checked(llm: LLM, toy_engine: Path) -> None:
    for wrong in (-2, 1.5, "8", True):
        with pytest.raises(RequestError, match="thinking_token_budget"):
            SamplingParams(thinking_token_budget=wrong)  # pyright: ignore[reportArgumentType]
    form = StructuredOutputsParams(choice=["a"])
    with pytest.raises(RequestError, match="in chat alone"):
        llm.generate("<think>", SamplingParams(structured_outputs=form, thinking_token_budget=3))
    with LLM(toy_engine, num_blocks=20) as other, pytest.raises(RequestError, match="which this vocabulary lacks"):
        other.generate("a", SamplingParams(thinking_token_budget=3))


def test_a_form_begins_behind_the_thought(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["red", "blue"])
    params = replace(HOT, structured_outputs=form, thinking_token_budget=6)
    (one,) = llm.chat(USER, params, **THINKING)[0].outputs
    assert one.message is not None and one.message.content in ("red", "blue") and one.finish_reason == "stop"
    assert llm.chat(USER, replace(HOT, structured_outputs=form))[0].outputs[0].text in ("red", "blue")


# --- tools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sum"}}])
def test_a_call_that_is_demanded_comes_and_fits(llm: LLM, thinking: bool, choice: Any) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=500, thinking_token_budget=4 if thinking else None)
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    kwargs = {"chat_template_kwargs": {"thinking": thinking}}
    (one,) = llm.chat(USER, params, **options, **kwargs)[0].outputs
    assert one.message is not None and one.finish_reason == "stop"
    (call,) = one.message.tool_calls
    assert not call.problems and one.message.content == ""
    assert (one.message.reasoning_content is not None) == thinking
    if call.name == "sum":
        arguments = json.loads(call.arguments)
        assert isinstance(arguments["a"], int) and arguments["unit"] in ("m", "s")
    else:
        assert (call.name, call.arguments) == ("now", "{}") and choice == "required"
    turn = [*USER, one.message, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
    assert llm.chat_request(turn, params, tools=TOOLS, **kwargs).prompt.text.endswith(
        "<think>" if thinking else "</think>"
    )


def test_a_form_and_tools_go_together(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}
    for seed in range(3):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=500)
        request = llm.chat_request(USER, params, tools=TOOLS, response_format=form)
        assert "## Response Format:" in request.prompt.text and "## Tools" in request.prompt.text
        (one,) = llm.chat(USER, params, tools=TOOLS, response_format=form)[0].outputs
        assert one.message is not None
        assert one.message.content.strip() in ("1", "2") or one.message.tool_calls


def test_without_a_choice_of_tools_there_are_none(llm: LLM) -> None:
    plain, none = llm.chat_request(USER), llm.chat_request(USER, tools=TOOLS, tool_choice="none")
    assert none.prompt == plain.prompt and not none.reads_calls
    assert llm.chat_request(USER, tools=TOOLS).reads_calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking": True}, "chat has no 'thinking'"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "expected 'thinking'"),
        ({"chat_template_kwargs": {"thinking": 1}}, "thinking is 1, expected true or false"),
        ({"chat_template_kwargs": 1}, "expected a mapping"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "always", "tools": TOOLS}, "tool_choice is 'always'"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": TOOLS}, "none of the tools"),
        ({"tool_choice": "required", "tools": TOOLS, "response_format": {"type": "json_object"}}, "no room"),
        ({"response_format": {"type": "xml"}}, "response_format is"),
        ({"response_format": {"type": "json_schema"}}, "response_format is"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls is 'no'"),
        ({"chat_template": 3}, "chat_template is 3"),
    ],
)
def test_options_that_are_none_are_one_line(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.chat(USER, HOT, **options)
    assert "\n" not in str(caught.value) and idle(llm)


CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "now"}}, {"function": {"name": "now"}}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*USER, {"role": "assistant", "content": "x"}], "pass continue_final_message=True"),
        ([{"role": "system", "content": "x"}], "the last message is of system"),
        ([*USER, CALLED, {"role": "tool", "content": "1"}], "the last 2 tool calls have 1 results"),
    ],
)
def test_it_has_to_be_the_turn_of_the_assistant(llm: LLM, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, HOT)


def test_a_family_without_encoding_is_one_line(chat_engine: Path, toy_engine: Path, tmp_path: Path) -> None:
    write_chat_engine(tmp_path / "v3", toy_engine, model_type="deepseek_v3")
    with LLM(tmp_path / "v3", num_blocks=20) as llm:
        with pytest.raises(EngineError, match="models of type 'deepseek_v3' have no chat encoding here"):
            llm.chat(USER, HOT)
        assert llm.chat(USER, HOT, chat_template="{{ messages[0].content }}")[0].prompt == "the cat"


def test_the_examples_of_the_documentation_run(
    chat_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "engine").symlink_to(chat_engine)
    monkeypatch.chdir(tmp_path)
    exec(compile(first.replace("2000", "40").replace("1000", "9"), str(DOCS), "exec"), {})
    capsys.readouterr()
    exec(compile(second, str(DOCS), "exec"), {})
    assert "content='It is late.', reasoning_content='Let me look.'" in capsys.readouterr().out


# --- streams ----------------------------------------------------------------------------------------------------


def test_deltas_of_a_stream_are_the_message(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=500, n=2, thinking_token_budget=4)
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", **THINKING}
    deltas = list(llm.chat_stream(USER, params, **options))
    outputs = llm.chat(USER, params, **options)[0].outputs
    assert deltas[-1].output is not None
    for one, streamed in zip(outputs, deltas[-1].output.outputs, strict=True):
        assert one.message is not None and streamed.message is not None
        assert [(c.name, c.arguments) for c in one.message.tool_calls] == [
            (c.name, c.arguments) for c in streamed.message.tool_calls
        ]
        gained = [delta.message for delta in deltas if delta.index == one.index and delta.message is not None]
        assert "".join(delta.reasoning_content for delta in gained) == one.message.reasoning_content
        calls = [call for delta in gained for call in delta.tool_calls if call.index == 0]
        assert "".join(call.arguments for call in calls) == one.message.tool_calls[0].arguments
        assert calls[0].id == streamed.message.tool_calls[0].id


def test_a_stream_that_is_closed_ends_its_request(llm: LLM) -> None:
    stream = llm.chat_stream(USER, replace(HOT, max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert idle(llm)


def test_asyncio_gets_the_same_deltas(chat_engine: Path, llm: LLM) -> None:
    async def answer() -> list[Any]:
        async with AsyncLLM(chat_engine, num_blocks=60) as served:
            return [delta async for delta in served.chat(USER, HOT, **THINKING)]

    deltas = asyncio.run(answer())
    message = llm.chat(USER, HOT, **THINKING)[0].outputs[0].message
    assert deltas[-1].output.outputs[0].message == message
    assert "".join(delta.message.reasoning_content for delta in deltas) == message.reasoning_content  # pyright: ignore


def test_a_template_of_ones_own_is_rendered(llm: LLM, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if x %}{{ x }}{% endif %}"
    )
    (tmp_path / "chat.jinja").write_text(template)
    messages = [{"role": "user", "content": "a<think>b"}]
    for source in (template, tmp_path / "chat.jinja"):
        (output,) = llm.chat(messages, HOT, chat_template=source, chat_template_kwargs={"x": "!"})
        assert output.prompt == "<｜begin▁of▁sentence｜>[user] a<think>b!"
        assert output.prompt_token_ids[0] == 0
        assert llm.get_tokenizer().token_id("<think>") not in output.prompt_token_ids
