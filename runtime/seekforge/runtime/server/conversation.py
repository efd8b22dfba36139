"""Conversations on their way, whatever interface they came by: messages to a request, pieces to deltas of messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seekforge.runtime.chat import ChatParser, ChatRequest, MessageDelta
from seekforge.runtime.openai.answers import TokenRow
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.sequence import FinishReason
from seekforge.runtime.server.channel import End, Piece
from seekforge.runtime.server.context import Call, Context

#: Up to so many characters a conversation is encoded at once, and not by another thread.
_SHORT = 4096

#: What answers gained: index, piece, deltas of the message.
Gains = list[tuple[int, Piece, list[MessageDelta]]]


@dataclass
class Choice:
    """One answer while it comes.

    Attributes:
        parser: reads its text.
        finish_reason, stop_reason: why it ended; None before.
        token_ids: its tokens.
        rows: log-probabilities of its tokens, if they were asked.
        num_reasoning_tokens: how many of its tokens were thought.
    """

    parser: ChatParser
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] = field(default_factory=list)
    rows: list[TokenRow] = field(default_factory=list)
    num_reasoning_tokens: int = 0

    def take(self, piece: Piece) -> list[MessageDelta]:
        """Take what came; returns what the message gained."""
        if self.parser.in_reasoning:
            self.num_reasoning_tokens += len(piece.token_ids)
        self.token_ids += piece.token_ids
        deltas = list(self.parser.push(piece.text)) if piece.text else []
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
            deltas += self.parser.finish()
        self.rows += piece.logprobs
        return deltas

    @property
    def reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        if self.finish_reason == "stop":
            return "tool_calls" if self.parser.message.tool_calls else "stop"
        return "length"


@dataclass
class Conversation:
    """A conversation that the engine answers.

    Attributes:
        request: what is asked.
        prompt_ids: the tokens of the prompt.
        choices: the answers.
        end: the facts of the request, once it has ended.
    """

    request: ChatRequest
    prompt_ids: Sequence[int]
    choices: list[Choice]
    end: End | None = None

    @staticmethod
    async def of(
        context: Context, messages: object, params: SamplingParams, options: Mapping[str, Any]
    ) -> Conversation:
        """Make one.

        Args:
            context: the server.
            messages: as the OpenAI interface writes them.
            params: the sampling parameters.
            options: those of `ChatOptions`.

        Raises:
            RequestError: the messages cannot stand like this.
            EngineError: the model has no chat encoding.
        """
        options = {**options, "split_special_tokens": not context.settings.allow_special_tokens}

        def make() -> tuple[ChatRequest, Sequence[int]]:
            request = context.chat.request(messages, params, options)
            return request, context.tokenizer.encode_segments(request.prompt, context.longest_prompt(params))

        size = sum(len(str(message)) for message in messages) if isinstance(messages, list) else 0
        request, ids = make() if size <= _SHORT else await asyncio.to_thread(make)
        return Conversation(request, ids, [Choice(request.parser()) for _ in range(request.params.n)])

    async def deltas(self, call: Call, priority: int = 0) -> AsyncGenerator[Gains, None]:
        """Give what the answers gain as it comes; first of all, when the request is accepted, nothing.

        Raises:
            RequestError: it cannot be served.
            GenerationError: the engine failed on it.
        """
        timer = call.context.metrics.timer()
        in_reasoning = self.request.prompt.in_reasoning
        async with call.streams([self.prompt_ids], self.request.params, priority, in_reasoning=in_reasoning) as (
            stream,
        ):
            yield []
            while self.end is None:
                pieces = await stream.read()
                timer.came()
                gained = []
                for piece in pieces:
                    gained.append((piece.choice, piece, self.choices[piece.choice].take(piece)))
                    self.end = piece.end or self.end
                if self.end is not None:
                    call.log["completion_tokens"] = self.end.num_completion_tokens
                    timer.ended(self.choices[0].reason, self.end.num_prompt_tokens, self.end.num_completion_tokens)
                yield gained

    async def whole(self, call: Call, priority: int = 0) -> End:
        """Wait for the end; the answers are in `choices`."""
        async for _ in self.deltas(call, priority):
            pass
        assert self.end is not None
        return self.end

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of all answers that were thought."""
        return sum(choice.num_reasoning_tokens for choice in self.choices)
