"""One conversation as it goes on: what was said, and answers with their tool calls. Knows no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from seekforge.runtime.chat.messages import Message, ToolCall
from seekforge.runtime.cli.chat_tools import TOOLS, call_tool
from seekforge.runtime.engine.outputs import Delta, RequestOutput
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams

#: A model that calls tools for ever is stopped.
MOST_ROUNDS = 16


@dataclass(frozen=True)
class ToolResult:
    """A call and what its tool said."""

    call: ToolCall
    content: str


class ChatSession:
    """A conversation with an engine.

    Attributes:
        messages: what was said so far.
        stopped: asks the answer on its way to end; what it said until then is kept.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, *, thinking: bool, system: str | None = None, tools: bool = False
    ) -> None:
        self._llm, self._params = llm, params
        self._system = system
        self._options: dict[str, Any] = {"chat_template_kwargs": {"thinking": thinking}}
        if tools:
            self._options["tools"] = TOOLS
        self.messages: list[Message] = []
        self.stopped: Callable[[], bool] = lambda: False
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.messages = [] if self._system is None else [Message("system", self._system)]

    def check(self) -> None:
        """Refuse what cannot be served before the engine is loaded.

        Raises:
            RequestError, EngineError: it cannot.
        """
        request = self._llm.chat_request([*self.messages, Message("user", "a")], self._params, **self._options)
        self._llm.check(request.prompt, request.params)

    def say(self, text: str) -> Iterator[Delta | ToolResult | RequestOutput]:
        """Say something and yield the answer as it comes: deltas, results of tools, and the output of each round.

        What was said stays in the conversation only if it is answered.
        """
        turns = [Message("user", text)]
        for _ in range(MOST_ROUNDS):
            message, output = Message("assistant"), None
            stream = self._llm.chat_stream([*self.messages, *turns], self._params, **self._options)
            for delta in stream:
                yield delta
                gained = delta.message
                if gained is not None:
                    message = replace(message, content=message.content + gained.content)
                output = delta.output
                if output is None and self.stopped():
                    stream.close()
                    break
            if output is None:
                if message.content:  # its thought is left out of what follows anyway
                    self.messages += [turns[0], message]
                return
            yield output
            message = output.outputs[0].message
            assert message is not None
            turns.append(message)
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                content = call_tool(call.name, call.arguments)
                yield ToolResult(call, content)
                turns.append(Message("tool", content, tool_call_id=call.id))
        self.messages += turns
