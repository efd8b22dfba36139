"""/v1/messages as Anthropic's own client reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anthropic
import pytest
from tests.runtime.server.endpoints.test_openai_client import TOOLS, script
from tests.support.scripted_engine import LiveServer, live_server

from seekforge.runtime.server.engine_client import EngineDeadError

ASK = [{"role": "user", "content": "How is it in Oslo?"}]
FUNCTION = TOOLS[0]["function"]
TOOL = {"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(tiny_checkpoint, script) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def test_an_answer(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="scripted", max_tokens=100, messages=ASK, system="Be brief.")
    assert [block.text for block in answer.content] == ["It rains."]
    assert answer.stop_reason == "end_turn"


def test_a_thought_is_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(
        model="scripted", max_tokens=2000, messages=ASK, thinking={"type": "enabled", "budget_tokens": 1024}
    )
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "Let me see."


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_used(client: anthropic.Anthropic, stream: bool) -> None:
    asked = {"model": "scripted", "max_tokens": 200, "messages": ASK, "tools": [TOOL]}
    if stream:
        with client.messages.stream(**asked) as events:
            first = events.get_final_message()
    else:
        first = client.messages.create(**asked)
    text, call = first.content
    assert (text.text, call.name, call.input) == ("I will look.", "weather", {"city": "Oslo", "days": 3})
    assert first.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    talk = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**asked | {"messages": talk})
    assert second.content[0].text == "It rains."


def test_results_go_back_in_the_order_of_their_calls(client: anthropic.Anthropic, server: LiveServer) -> None:
    calls = [{"type": "tool_use", "id": name, "name": "weather", "input": {"city": name}} for name in ("A", "B")]
    results = [{"type": "tool_result", "tool_use_id": name, "content": f"of {name}"} for name in ("B", "A")]
    talk = [*ASK, {"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    client.messages.create(model="scripted", max_tokens=50, messages=talk, tools=[TOOL])
    assert "<result>of A</result>\n<result>of B</result>" in server.engine.prompts[-1]


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic, server: LiveServer) -> None:
    before = len(server.engine.prompts)
    assert client.messages.count_tokens(model="scripted", messages=ASK).input_tokens > 5
    assert len(server.engine.prompts) == before


def test_an_answer_can_be_begun(client: anthropic.Anthropic, server: LiveServer) -> None:
    talk = [*ASK, {"role": "assistant", "content": "It is"}]
    client.messages.create(model="scripted", max_tokens=50, messages=talk)
    assert server.engine.prompts[-1].endswith("</think>It is")


def test_errors_have_the_shape_that_it_knows(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="image") as wrong:
        content = [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]
        client.messages.create(model="scripted", max_tokens=5, messages=[{"role": "user", "content": content}])
    assert wrong.value.body["error"]["type"] == "invalid_request_error"


def test_an_error_in_the_middle_of_a_stream_is_raised(client: anthropic.Anthropic, server: LiveServer) -> None:
    server.engine.hold = True
    try:
        with client.messages.stream(model="scripted", max_tokens=100, messages=ASK) as events:
            for stream in server.engine.running.values():
                stream.fail(EngineDeadError("the process that runs the engine ended by signal 9"))
            with pytest.raises(anthropic.APIStatusError, match="signal 9"):
                events.until_done()
    finally:
        server.engine.hold = False


def test_a_choice_of_tools_that_is_none_is_refused(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        client.messages.create(model="scripted", max_tokens=5, messages=ASK, extra_body={"tool_choice": {"type": []}})
