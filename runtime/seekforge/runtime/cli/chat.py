"""`seekforge chat`: talk with an engine in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from seekforge.common.cli.console import Console, Stages, console, styled
from seekforge.common.cli.options import Tokens, command, json_option, quiet_option, threads_option
from seekforge.common.cli.terminal import shown, write_json
from seekforge.common.errors import RequestError
from seekforge.common.system import Terminated
from seekforge.runtime.cli.chat_session import ChatSession, ToolResult
from seekforge.runtime.cli.options import check_checkpoint, checkpoint_option, drafts_option, open_engine
from seekforge.runtime.cli.sampling_options import OPTIONS, params_of
from seekforge.runtime.engine.outputs import Delta, RequestOutput
from seekforge.runtime.llm import LLM

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "thinking_token_budget")
_HELP = "/new begins another conversation, /quit or Ctrl-D ends, Ctrl-C ends an answer"


def _sampling_options(function: Any) -> Any:
    for name in reversed(_SAMPLING):
        function = OPTIONS[name](function)
    return function


@command(
    "chat",
    examples=(
        "seekforge chat engine",
        "seekforge chat engine --no-thinking --temperature 0.6",
        "seekforge chat engine --tools --thinking-token-budget 2048",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--system", help="What the model is told before.")
@click.option("--thinking/--no-thinking", default=True, show_default=True, help="Reason before each answer.")
@click.option("--tools", is_flag=True, help="Two examples of tools: a calculator and a clock.")
@click.option("--max-tokens", type=Tokens(), help="Of one answer. Default: what the context has room for.")
@_sampling_options
@click.option("--max-model-len", type=Tokens(), help="Tokens of the whole conversation. Default: the engine's limit.")
@drafts_option
@checkpoint_option
@threads_option
@quiet_option
@json_option
def chat(
    engine: Path,
    system: str | None,
    thinking: bool,
    tools: bool,
    max_tokens: int | None,
    max_model_len: int | None,
    num_speculative_tokens: int,
    checkpoint: Path | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk with ENGINE, a folder written by 'seekforge build'.

    With --json each message is a line of JSON, those of the user and of tools too.

    Type a message and a newline. Thoughts are dimmed. Ctrl-C ends an answer and not the chat; what was said until then
    is kept. /new begins another conversation, /quit or Ctrl-D ends.

    What was said before is found in the prefix cache, and not computed again.
    """
    stages = Stages(quiet=quiet or as_json)
    opened = open_engine(engine, stages)
    check_checkpoint(opened, checkpoint)
    stages.done(f"engine   {engine}: target {opened.manifest.target.name}")
    session: ChatSession | None = None

    def check(llm: LLM) -> None:
        nonlocal session
        params = replace(llm.default_sampling_params, max_tokens=max_tokens, **params_of(sampling))
        session = ChatSession(llm, params, thinking=thinking, system=system, tools=tools)
        session.check()

    stages("loading")
    with LLM(
        opened,
        max_batch_size=1,
        max_model_len=max_model_len,
        num_speculative_tokens=num_speculative_tokens,
        checkpoint=checkpoint,
        threads=threads,
        before_load=check,
    ) as llm:
        stages.done(f"loaded   room for {llm.max_model_len} tokens")
        stages.say(_HELP)
        assert session is not None
        _talk(session, quiet=quiet or as_json, as_json=as_json)


def _talk(session: ChatSession, *, quiet: bool, as_json: bool) -> None:
    screen, aside = console(), console(err=True, quiet=quiet)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` the keys of an editor

    while (text := _read(aside)) is not None:
        if text == "/quit":
            return
        if text == "/new":
            session.clear()
        elif text.startswith("/") and " " not in text:
            aside.print(_HELP)
        elif text:
            try:
                with _interruptible(session):
                    if as_json:
                        _answer_json(session, text)
                    else:
                        _answer(session, text, screen, aside)
            except RequestError as error:  # such as a conversation that has become too long
                console(err=True).print(styled((f"{error}", "red")))


def _read(aside: Console) -> str | None:
    """Return the next message; None at the end. An interrupt leaves the line, and not the chat."""
    while True:
        try:
            return (input("> ") if sys.stdin.isatty() else input()).strip()
        except EOFError:
            return None
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            aside.print("")


@contextlib.contextmanager
def _interruptible(session: ChatSession) -> Iterator[None]:
    """Let SIGINT ask the answer to end between two steps; a second one interrupts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def ask(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    before = signal.signal(signal.SIGINT, ask)
    session.stopped = lambda: interrupted
    try:
        yield
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(session: ChatSession, text: str, screen: Console, aside: Console) -> None:
    """Print an answer as it comes: content to stdout, thoughts and all else to stderr where stdout is no terminal."""
    thoughts = screen if screen.is_terminal else aside
    was_thinking, whole = False, False
    for event in session.say(text):
        whole = isinstance(event, RequestOutput)
        match event:
            case Delta(message=message) if message is not None:
                _write(thoughts, message.reasoning_content, "dim")
                if message.content and was_thinking:
                    _write(thoughts, "\n", "")
                was_thinking = bool(message.reasoning_content) or (was_thinking and not message.content)
                _write(screen, message.content, "")
            case ToolResult(call=call, content=content):
                aside.print(styled((f"\n{call.name}({call.arguments})".strip(), "cyan"), (f" → {content}", "cyan")))
                for problem in call.problems:
                    aside.print(styled((f"  {problem}", "yellow")))
            case RequestOutput():
                _write(screen, "\n", "")
                aside.print(styled((_speed(event), "dim")))
    if not whole:
        _write(screen, "\n", "")
        aside.print(styled(("(ended)", "dim")))


def _answer_json(session: ChatSession, text: str) -> None:
    """Print what the conversation gains, a message a line."""
    before = len(session.messages)
    for _ in session.say(text):
        pass
    for message in session.messages[before:]:
        write_json(message.to_dict())


def _write(target: Console, text: str, style: str) -> None:
    if text:
        target.print(Text(shown(text, keep="\n\t"), style=style), end="", soft_wrap=True)


def _speed(output: RequestOutput) -> str:
    metrics = output.metrics
    rate = metrics.decode_tokens / max(metrics.decode_s, 1e-9)
    reason = output.outputs[0].finish_reason
    return (
        f"{output.usage.completion_tokens} tokens at {rate:.1f} tok/s; {metrics.cached_tokens} of "
        f"{output.usage.prompt_tokens} tokens of the prompt from the cache"
        + ("" if reason == "stop" else f"; {reason}")
    )
