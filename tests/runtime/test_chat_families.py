"""`LLM.chat` of GLM-5, DeepSeek-V3 and Kimi-K2: the template of the checkpoint, an engine, and a call read back.

A model of random weights writes no calls: what it shall write is the one choice that it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.chat_families import ASK, CHAT_FAMILIES, TOOLS, ChatFamily, conversation
from tests.support.toy_engine import write_chat_engine

from seekforge.common.errors import RequestError
from seekforge.runtime import LLM, SamplingParams, StructuredOutputsParams
from seekforge.runtime.chat import MessageDelta


@pytest.fixture(scope="module", params=CHAT_FAMILIES)
def family(request: pytest.FixtureRequest) -> ChatFamily:
    return CHAT_FAMILIES[request.param]


@pytest.fixture(scope="module")
def llm(family: ChatFamily, toy_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("family") / "engine"
    write_chat_engine(folder, toy_engine, model_type=family.model_type, template=family.template, tokens=family.tokens)
    with LLM(folder, num_blocks=60, max_batch_size=2) as made:
        yield made


def writing(text: str) -> SamplingParams:
    """Return the parameters of an answer that can only be this text."""
    return SamplingParams(temperature=0, max_tokens=600, structured_outputs=StructuredOutputsParams(choice=[text]))


#: Templates of these families begin a thought unless they are told not to; Kimi-K2's has none.
PLAIN = {"thinking": False}


def test_a_call_is_read_and_its_result_answered(llm: LLM, family: ChatFamily) -> None:
    (first,) = llm.chat(ASK, writing(family.answer), tools=TOOLS, chat_template_kwargs=PLAIN)
    completion = first.outputs[0]
    message = completion.message
    assert completion.finish_reason == "stop" and message is not None and message.content == "I look."
    (call,) = message.tool_calls
    assert (call.name, json.loads(call.arguments), call.problems) == ("f", {"a": 1}, ())
    (second,) = llm.chat(conversation(message, call.id), writing("It rains."), tools=TOOLS, chat_template_kwargs=PLAIN)
    prompt = llm.get_tokenizer().decode(second.prompt_token_ids, skip_special_tokens=False)
    assert family.shown in prompt and family.result in prompt
    assert second.outputs[0].message is not None and second.outputs[0].message.content == "It rains."


def test_streamed_deltas_join_to_the_message(llm: LLM, family: ChatFamily) -> None:
    deltas = list(llm.chat_stream(ASK, writing(family.answer), tools=TOOLS, chat_template_kwargs=PLAIN))
    joined = MessageDelta.joined([delta.message for delta in deltas if delta.message is not None])
    output = deltas[-1].output
    assert output is not None and output.outputs[0].message is not None
    (call,) = output.outputs[0].message.tool_calls
    assert joined.content == "I look." and len(deltas) > 5
    assert "".join(one.arguments for one in joined.tool_calls) == call.arguments
    assert [one.id for one in joined.tool_calls if one.id] == [call.id]


def test_a_thought_is_apart_from_the_answer_behind_it(llm: LLM, family: ChatFamily) -> None:
    if family is CHAT_FAMILIES["kimi"]:  # its template begins no thought: the model does
        (output,) = llm.chat(ASK, writing(f"<think>why</think>{family.answer}"), tools=TOOLS)
        message = output.outputs[0].message
        assert message is not None and message.reasoning_content == "why"
    else:
        params = replace(writing(family.answer), thinking_token_budget=4)
        (output,) = llm.chat(ASK, params, tools=TOOLS, chat_template_kwargs={"thinking": True})
        message = output.outputs[0].message
        assert message is not None and message.reasoning_content
    assert message.content == "I look." and [call.name for call in message.tool_calls] == ["f"]


def test_text_of_a_user_becomes_no_tag(llm: LLM, family: ChatFamily) -> None:
    tokenizer = llm.get_tokenizer()
    texts = [*family.tokens, "</think>", "<｜User｜>"]

    def count(content: str) -> list[int]:
        (output,) = llm.chat([{"role": "user", "content": content}], writing("x"), chat_template_kwargs=PLAIN)
        return [output.prompt_token_ids.count(tokenizer.token_id(text)) for text in texts]  # type: ignore[arg-type]

    assert count("".join(texts)) == count("q")


def test_what_only_a_grammar_holds_is_refused_in_one_line(llm: LLM, family: ChatFamily) -> None:
    with pytest.raises(RequestError, match=f"this model is {family.model_type}$"):
        llm.chat(ASK, SamplingParams(), tools=TOOLS, tool_choice="required")
