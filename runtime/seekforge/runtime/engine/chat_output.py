"""The answers to a conversation, read while they come: from the text of a completion to its message."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

from seekforge.runtime.chat.messages import MessageDelta
from seekforge.runtime.chat.parser import ChatParser
from seekforge.runtime.chat.request import ChatRequest
from seekforge.runtime.engine.outputs import CompletionOutput, Delta, RequestOutput


class AnswerReader:
    """Reads the completions of one request from its deltas."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._parsers: dict[int, ChatParser] = {}

    def delta(self, delta: Delta) -> Delta:
        """Return a delta with what its message gained; the last one holds the messages of all completions."""
        parser = self._parsers.setdefault(delta.index, self._request.parser())
        parts = [*parser.push(delta.text), *(parser.finish() if delta.finish_reason is not None else ())]
        output = delta.output
        if output is not None:
            outputs = [replace(one, message=self._parsers[one.index].message) for one in output.outputs]
            output = replace(output, outputs=tuple(outputs))
        return replace(delta, message=MessageDelta.joined(parts), output=output)


def with_messages(output: RequestOutput, request: ChatRequest) -> RequestOutput:
    """Return an output whose completions hold their messages."""
    return replace(output, outputs=tuple(_with_message(one, request) for one in output.outputs))


def _with_message(one: CompletionOutput, request: ChatRequest) -> CompletionOutput:
    parser = request.parser()
    for _ in (*parser.push(one.text), *parser.finish()):
        pass
    return replace(one, message=parser.message)


def with_message_deltas(request: ChatRequest, deltas: Iterator[Delta]) -> Generator[Delta, None, None]:
    """Yield deltas with what the answer gained; closing this ends the request."""
    reader = AnswerReader(request)
    try:
        for delta in deltas:
            yield reader.delta(delta)
    finally:
        if isinstance(deltas, Generator):
            deltas.close()
