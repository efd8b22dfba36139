"""`seekforge chat` on the toy engine, and its example tools."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from seekforge.common.cli.console import console
from seekforge.common.system import Terminated
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.chat import Message, ToolCall
from seekforge.runtime.cli.chat import _interruptible, _read
from seekforge.runtime.cli.chat_session import ChatSession, ToolResult
from seekforge.runtime.cli.chat_tools import calculate, call_tool
from seekforge.runtime.cli.main import main
from seekforge.runtime.engine.outputs import Delta, RequestOutput

PARAMS = SamplingParams(temperature=2.0, seed=1, max_tokens=12, ignore_eos=True, thinking_token_budget=4)


@pytest.fixture(scope="module")
def llm(chat_engine: Path) -> Iterator[LLM]:
    with LLM(chat_engine, num_blocks=60, max_batch_size=1) as llm:
        yield llm


def chat(*args: str, text: str) -> Any:
    return CliRunner().invoke(main, ["chat", *args], input=text)


def test_messages_are_answered_and_thoughts_stand_aside(chat_engine: Path) -> None:
    arguments = [str(chat_engine), "--seed", "1", "--max-tokens", "12", "--thinking-token-budget", "4"]
    done = chat(*arguments, text="the cat\n/help\nthe mat\n/new\n/quit\nnever\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("tokens of the prompt from the cache") == 2 and "/new begins" in done.stderr
    assert done.stdout.count("\n") >= 2


def test_messages_are_lines_of_json(chat_engine: Path) -> None:
    done = chat(str(chat_engine), "--json", "--no-thinking", "--seed", "1", "--max-tokens", "6", text="a\nb\n")
    assert done.exit_code == 0 and not done.stderr
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2] == {"role": "user", "content": "b"}


def test_run_answers_one_message(chat_engine: Path) -> None:
    arguments = ["run", str(chat_engine), "--prompt", "the cat", "--chat", "--thinking", "--system", "a mat"]
    arguments += ["--thinking-token-budget", "3", "--max-tokens", "9", "--ignore-eos", "--seed", "1"]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    (completion,) = json.loads(done.stdout)["completions"]
    message = completion["message"]
    assert message["reasoning_content"] + "</think>" + message["content"] == completion["text"]
    plain = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert plain.stdout == message["content"] + "\n" and plain.stderr == message["reasoning_content"] + "\n"
    for wrong in (["--thinking"], ["--system", "a"], ["--chat", "--batch", "a", "--output", "b"]):
        extra = wrong if "--batch" in wrong else [*wrong, "--prompt", "a"]
        assert CliRunner().invoke(main, ["run", str(chat_engine), *extra]).exit_code == 2


def test_an_option_that_cannot_be_served_is_one_line_before_weights_are_read(
    toy_engine: Path, chat_engine: Path
) -> None:
    done = chat(str(toy_engine), "--quiet", text="")
    assert done.exit_code == 2 and "have no chat encoding here" in done.stderr
    done = chat(str(chat_engine), "--quiet", "--max-tokens", "99K", text="")
    assert done.exit_code == 2 and "max_model_len" in done.stderr


def test_a_conversation_grows_and_its_beginning_comes_from_the_cache(llm: LLM) -> None:
    session = ChatSession(llm, PARAMS, thinking=False, system="the cat sat on the mat " * 20)
    outputs: list[RequestOutput] = []
    for _ in range(2):
        outputs += [event for event in session.say("the cat") if isinstance(event, RequestOutput)]
    assert [message.role for message in session.messages] == ["system", *["user", "assistant"] * 2]
    assert session.messages[2] == outputs[0].outputs[0].message
    assert outputs[1].num_cached_tokens >= 128
    session.clear()
    assert [message.role for message in session.messages] == ["system"]


def test_an_answer_that_is_ended_keeps_what_it_said(llm: LLM) -> None:
    for thinking, kept in ((False, ["user", "assistant"]), (True, [])):
        session = ChatSession(llm, PARAMS, thinking=thinking)
        said = ""
        for event in session.say("the cat"):
            assert isinstance(event, Delta) and event.message is not None
            said += event.message.content
            session.stopped = lambda: True
        assert [message.role for message in session.messages] == kept
        if kept:
            assert session.messages[1].content == said
        assert llm.metrics().num_running == 0


def test_an_interrupt_ends_an_answer_and_not_the_chat(llm: LLM) -> None:
    session = ChatSession(llm, PARAMS, thinking=False)
    before = signal.getsignal(signal.SIGINT)
    with _interruptible(session):
        for _ in session.say("the cat"):
            assert not session.stopped()
            signal.raise_signal(signal.SIGINT)
        assert session.stopped() and len(session.messages) == 2
    with _interruptible(session):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a second one interrupts whatever lasts
        raise AssertionError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_termination_ends_the_chat_as_it_answers_and_as_it_waits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt does not, and a termination is one of a kind."""

    def terminated(*_: object) -> str:
        raise Terminated

    with pytest.raises(Terminated), _interruptible(ChatSession(llm, PARAMS, thinking=False)):
        terminated()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", terminated)
    with pytest.raises(Terminated):
        _read(console(quiet=True))


def test_tools_are_called_until_there_is_an_answer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy model calls nothing by itself: the first answer is put in its place."""
    session = ChatSession(llm, PARAMS, thinking=True, tools=True)
    call = ToolCall("id", "calculator", json.dumps({"expression": "2 ** 10"}))
    real, conversations = llm.chat_stream, []

    def stream(messages: Any, params: Any, **options: Any) -> Iterator[Delta]:
        conversations.append(list(messages))
        for delta in real(messages, params, **options):
            if len(conversations) == 1 and delta.output is not None:
                first = delta.output.outputs[0]
                object.__setattr__(first, "message", Message("assistant", "", "why", (call,)))
            yield delta

    monkeypatch.setattr(llm, "chat_stream", stream)
    events = list(session.say("how much?"))
    assert [event.content for event in events if isinstance(event, ToolResult)] == ["1024"]
    assert [message.role for message in conversations[1]] == ["user", "assistant", "tool"]
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("-(2 ** 3) // 3", -3),
        ("sqrt(2) ** 2 - 2 < 1", None),
        ("round(pi, 2)", 3.14),
        ("7 % 4 / 2", 1.5),
    ],
)
def test_the_calculator_does_arithmetic(expression: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match="only numbers"):
            calculate(expression)
    else:
        assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "().__class__", "9 ** 9 ** 9", "2 ** 999 ** 2", "(" * 500, "'a' * 9", "1 if 1 else 2", "True",
     "x" * 2000, "(-8) ** 0.5", "1 / 0", "max(*[1])", "round(1, ndigits=2)", "1 << 9999"],
)  # fmt: skip
def test_the_calculator_does_nothing_else(expression: str) -> None:
    assert call_tool("calculator", json.dumps({"expression": expression})).startswith("error: ")


def test_what_a_model_asks_for_wrongly_is_told_to_it() -> None:
    assert call_tool("clock", "{}").endswith("+00:00")
    for name, arguments in (("clock", '{"timezone": "../etc"}'), ("clock", "{"), ("calculator", "{}"), ("rm", "{}")):
        assert call_tool(name, arguments).startswith("error: ")
