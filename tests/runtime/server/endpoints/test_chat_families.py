"""Conversations of GLM-5, DeepSeek-V3 and Kimi-K2 over real HTTP, with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.support.chat_families import ASK, CHAT_FAMILIES, TOOLS, ChatFamily, add_tokens, conversation
from tests.support.scripted_engine import LiveServer, live_server


@pytest.fixture(scope="module", params=CHAT_FAMILIES)
def family(request: pytest.FixtureRequest) -> ChatFamily:
    return CHAT_FAMILIES[request.param]


@pytest.fixture(scope="module")
def server(family: ChatFamily, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    add_tokens(tiny_checkpoint / "tokenizer.json", family.tokens, folder / "tokenizer.json")

    def script(prompt: str) -> str:
        return (
            "It rains." if "it rains" in prompt else f"why</think>{family.answer}" if think(prompt) else family.answer
        )

    def think(prompt: str) -> bool:
        return prompt.endswith("<think>")

    with live_server(folder, script, model_type=family.model_type, template=family.template) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_used(
    client: openai.OpenAI, server: LiveServer, family: ChatFamily, stream: bool
) -> None:
    plain = {"chat_template_kwargs": {"thinking": False}}
    if stream:
        with client.chat.completions.stream(model="scripted", messages=ASK, tools=TOOLS, extra_body=plain) as events:
            first = events.get_final_completion().choices[0]
    else:
        answer = client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS, extra_body=plain)
        first = answer.choices[0]
    (call,) = first.message.tool_calls
    assert (first.finish_reason, first.message.content) == ("tool_calls", "I look.")
    assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": 1})
    talk = conversation(first.message.model_dump(exclude_none=True), call.id)
    second = client.chat.completions.create(model="scripted", messages=talk, tools=TOOLS, extra_body=plain).choices[0]
    assert (second.finish_reason, second.message.content) == ("stop", "It rains.")
    assert family.shown in server.engine.prompts[-1] and family.result in server.engine.prompts[-1]


def test_a_thought_is_apart(client: openai.OpenAI, family: ChatFamily) -> None:
    answer = client.chat.completions.create(
        model="scripted", messages=ASK, tools=TOOLS, extra_body={"chat_template_kwargs": {"thinking": True}}
    )
    message = answer.choices[0].message
    thought = (message.model_extra or {}).get("reasoning_content")
    assert thought == (None if family is CHAT_FAMILIES["kimi"] else "why")
    assert message.content == "I look." and [call.function.name for call in message.tool_calls] == ["f"]


def test_a_call_cannot_be_demanded_of_a_family_without_a_grammar_of_calls(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="is enforced for calls of deepseek_v32 alone"):
        client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS, tool_choice="required")
