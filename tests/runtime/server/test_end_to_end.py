"""Real clients, the real server and an engine: what a request demands of the text holds, whatever the model says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import openai
import pytest
from tests.support.served import served

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "pet": {"enum": ["cat", "dog"]}},
    "required": ["age", "pet"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
ASK: list[Any] = [{"role": "user", "content": "Well?"}]


@pytest.fixture(scope="module")
def address(tiny_engines: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    with served(tiny_engines["exact"], "0", "--served-model-name", "tiny", "--max-model-len", "1K") as (_, url, lines):
        yield url, lines


@pytest.fixture(scope="module")
def client(address: tuple[str, list[str]]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def fits(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"age", "pet"} and 0 <= value["age"] <= 99 and value["pet"] in ("cat", "dog")


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_has_the_form_of_its_schema(client: openai.OpenAI, thinking: bool) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=400,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}},
        extra_body={
            "chat_template_kwargs": {"thinking": thinking},
            "thinking_token_budget": 12,
            "structured_outputs": None,
        },
    ).choices[0]
    assert answer.finish_reason == "stop" and fits(answer.message.content)
    assert bool((answer.message.model_extra or {}).get("reasoning_content")) == thinking


@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_that_is_demanded_is_made(client: openai.OpenAI, thinking: bool) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=400,
        seed=3,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        extra_body={"chat_template_kwargs": {"thinking": thinking}, "thinking_token_budget": 12},
    ).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_the_responses_interface_has_forms_too(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "pet", "schema": SCHEMA}
    answer = client.responses.create(model="tiny", input="Well?", max_output_tokens=300, text={"format": form})
    assert answer.status == "completed" and fits(answer.output_text)


def test_anthropics_asynchronous_client_calls_tools_and_gets_forms(address: tuple[str, list[str]]) -> None:
    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=address[0], api_key="none", max_retries=0) as client:
            formed, called = await asyncio.gather(
                client.messages.create(
                    model="tiny",
                    max_tokens=300,
                    messages=ASK,
                    extra_body={"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
                ),
                client.messages.create(
                    model="tiny",
                    max_tokens=300,
                    messages=ASK,
                    tools=[{"name": "weather", "input_schema": CITY}],
                    tool_choice={"type": "any", "disable_parallel_tool_use": True},
                ),
            )
            assert fits(formed.content[0].text)
            assert called.stop_reason == "tool_use" and called.content[-1].input["city"] in ("Oslo", "Rome")
            pieces = []
            async with client.messages.stream(model="tiny", max_tokens=20, messages=ASK) as stream:
                pieces = [piece async for piece in stream.text_stream]
                assert "".join(pieces) == (await stream.get_final_text())

    asyncio.run(main())


def test_what_is_no_http_is_a_line_of_json_in_the_log(address: tuple[str, list[str]]) -> None:
    host, port = urlsplit(address[0]).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"\x00\xffnonsense\r\n\r\n")
        client.recv(1000)
    logged = [line for line in address[1] if not line.startswith(("loaded", "serving", " ")) and line.strip()]
    assert all(isinstance(json.loads(line), dict) for line in logged)
