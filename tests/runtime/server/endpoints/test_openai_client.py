"""The interfaces as OpenAI's own client reads them, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.support.scripted_engine import LiveServer, full_queue, live_server

CALL = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls><｜end▁of▁sentence｜>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
ASK = [{"role": "user", "content": "How is it in Oslo?"}]


def script(prompt: str) -> str:
    """Think if asked to; call the tool if there is one and no result yet."""
    thought = "Let me see.</think>" if prompt.endswith("<think>") else ""
    if "weather" in prompt and "<function_results>\n<result>" not in prompt:
        return thought + "I will look." + CALL
    return thought + "It rains.<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(tiny_checkpoint, script) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_an_answer_has_text_reason_and_usage(client: openai.OpenAI, server: LiveServer) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ASK)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("It rains.", "stop")
    assert server.engine.prompts[-1] == ("<｜begin▁of▁sentence｜><｜User｜>How is it in Oslo?<｜Assistant｜></think>")
    assert answer.usage is not None and answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )


def test_reasoning_is_apart_from_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ASK, reasoning_effort="high")
    message = answer.choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("It rains.", "Let me see.")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_streamed_pieces_join_to_the_answer(client: openai.OpenAI) -> None:
    thought, text, usage = "", "", None
    for chunk in client.chat.completions.create(
        model="scripted",
        messages=ASK,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"chat_template_kwargs": {"thinking": True}},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            text += choice.delta.content or ""
    assert (thought, text) == ("Let me see.", "It rains.")
    assert usage is not None and usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_used(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        with client.chat.completions.stream(model="scripted", messages=ASK, tools=TOOLS) as events:
            first = events.get_final_completion().choices[0]
    else:
        first = client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS).choices[0]
    (call,) = first.message.tool_calls
    assert (first.finish_reason, first.message.content) == ("tool_calls", "I will look.")
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo", "days": 3}')
    talk = [
        *ASK,
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    second = client.chat.completions.create(model="scripted", messages=talk, tools=TOOLS).choices[0]
    assert (second.finish_reason, second.message.content) == ("stop", "It rains.")


def test_arguments_come_before_the_call_is_complete(client: openai.OpenAI) -> None:
    pieces = []
    for chunk in client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS, stream=True):
        for choice in chunk.choices:
            pieces += [one.function.arguments for one in choice.delta.tool_calls or []]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == '{"city": "Oslo", "days": 3}'


def test_a_call_that_is_demanded_reaches_the_engine_as_a_grammar(client: openai.OpenAI, server: LiveServer) -> None:
    client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS, tool_choice="required")
    form = server.engine.params[-1].structured_outputs
    assert form is not None and form.grammar is not None and "weather" in form.grammar


def test_tools_that_shall_not_be_called_are_not_told(client: openai.OpenAI, server: LiveServer) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ASK, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert "weather" not in server.engine.prompts[-1]


def test_logprobs_stand_beside_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ASK, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content).startswith("It rains.")
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in content)


def test_several_answers_have_their_indices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ASK, n=3)
    assert [(one.index, one.message.content) for one in answer.choices] == [(i, "It rains.") for i in range(3)]


def test_without_a_limit_a_chat_has_the_rest_of_its_context(client: openai.OpenAI, server: LiveServer) -> None:
    client.chat.completions.create(model="scripted", messages=ASK)
    assert server.engine.params[-1].max_tokens is None


def test_a_thinking_budget_is_passed_on(client: openai.OpenAI, server: LiveServer) -> None:
    client.chat.completions.create(model="scripted", messages=ASK, extra_body={"thinking_token_budget": 5})
    assert server.engine.params[-1].thinking_token_budget == 5


def test_completions_of_several_prompts_come_in_their_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt=["a", "b"], n=2, max_tokens=100)
    assert [one.index for one in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 2


def test_an_echo_of_nothing_more_is_the_prompt_with_its_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt="a b c", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "a b c" == "".join(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] == -2.0
    assert answer.usage.completion_tokens == 0


def test_the_responses_interface_gives_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="scripted", input="How is it?", reasoning={"effort": "low"})
    assert (answer.output_text, answer.status) == ("It rains.", "completed")
    assert [item.type for item in answer.output] == ["reasoning", "message"]


def test_the_responses_interface_calls_tools(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "strict": False, **TOOLS[0]["function"]}]
    with client.responses.stream(model="scripted", input="How is it in Oslo?", tools=tools) as events:
        kinds = [event.type for event in events]
        first = events.get_final_response()
    call = first.output[-1]
    assert (call.type, call.arguments) == ("function_call", '{"city": "Oslo", "days": 3}')
    assert kinds.count("response.function_call_arguments.done") == 1
    items = [
        {"role": "user", "content": "How is it in Oslo?"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    assert client.responses.create(model="scripted", input=items, tools=tools).output_text == "It rains."


def test_lines_of_unicode_are_no_lines_of_events(server: LiveServer, client: openai.OpenAI, monkeypatch) -> None:
    monkeypatch.setattr(server.engine, "script", lambda prompt: "a\u2028b\u0085c")
    with client.chat.completions.with_streaming_response.create(model="scripted", messages=ASK, stream=True) as answer:
        lines = answer.read().decode().splitlines()
    assert all(line.startswith("data: ") for line in lines if line)
    text = "".join(
        choice.delta.content or ""
        for chunk in client.chat.completions.create(model="scripted", messages=ASK, stream=True)
        for choice in chunk.choices
    )
    assert text == "a\u2028b\u0085c"


def test_logprobs_of_a_response_are_there_for_each_token_of_its_text(client: openai.OpenAI) -> None:
    with client.responses.stream(model="scripted", input="How is it?", top_logprobs=1) as events:
        done = events.get_final_response()
    part = done.output[-1].content[0]
    assert "".join(entry.token for entry in part.logprobs).startswith("It rains")


def test_what_would_be_kept_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing is kept here"):
        client.responses.create(model="scripted", input="x", previous_response_id="resp_1")


def test_many_streams_at_once(server: LiveServer) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:

            async def one() -> str:
                events = await many.chat.completions.create(model="scripted", messages=ASK, stream=True)
                return "".join([c.delta.content or "" async for chunk in events for c in chunk.choices])

            return await asyncio.gather(*[one() for _ in range(32)])

    assert asyncio.run(main()) == ["It rains."] * 32


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=ASK)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="scripted", messages=ASK, temperature=-1)
    assert wrong.value.param == "temperature"
    server.engine.refusal = full_queue()
    try:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="scripted", messages=ASK)
    finally:
        server.engine.refusal = None


def test_what_begins_inside_a_thought_is_told_to_the_engine(client: openai.OpenAI, server: LiveServer) -> None:
    """A form, and a call that is demanded, begin behind the thought."""
    for effort, inside in (("high", True), ("none", False)):
        client.chat.completions.create(model="scripted", messages=ASK, reasoning_effort=effort)
        assert server.engine.in_reasoning[-1] is inside


def test_the_tokens_of_a_chat_are_given_where_they_are_wanted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=ASK, extra_body={"return_token_ids": True})
    assert len(answer.model_extra["prompt_token_ids"]) == answer.usage.prompt_tokens
    assert len(answer.choices[0].model_extra["token_ids"]) == answer.usage.completion_tokens


def test_a_chat_that_is_cut_may_be_longer_than_the_context(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "a b " * 5000}]
    with pytest.raises(openai.BadRequestError, match="more than 4096"):  # this engine refuses and cuts nothing
        client.chat.completions.create(model="scripted", messages=long, extra_body={"truncate_prompt_tokens": 100})
