"""`LLM.chat`: conversations become prompts, and what comes back becomes messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from seekforge.common.errors import RequestError
from seekforge.runtime.arguments import Prompt, read_params
from seekforge.runtime.chat.messages import Message, is_conversation
from seekforge.runtime.chat.request import ChatOptions, ChatProcessor, ChatRequest
from seekforge.runtime.engine.chat_output import with_message_deltas, with_messages
from seekforge.runtime.engine.outputs import Delta, RequestOutput
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.values import listed

#: Messages, or mappings with the keys of the OpenAI interface.
Conversation = Sequence[Message | Mapping[str, Any]]


class Conversations(ABC):
    """What answers conversations, by what answers prompts."""

    default_sampling_params: SamplingParams
    _chat: ChatProcessor

    @abstractmethod
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts together."""

    @abstractmethod
    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Iterator[Delta]:
        """Answer one prompt step by step."""

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = 0,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer conversations together.

        Args:
            messages: one conversation, or several: each a list of `Message`, or of mappings with the keys of the
                OpenAI interface.
            sampling_params: one for all, or one each; None takes `default_sampling_params`, with as many tokens as the
                context has room for.
            priority, timeout_s: the arguments of `generate`.
            options: see `ChatOptions`.

        Returns:
            One output per conversation, in their order; `message` of each completion is what it says.

        Raises:
            RequestError: messages that cannot stand like this, or as for `generate`.
            EngineError: the model's family has no chat encoding here.
            GenerationError: the engine failed on some; it holds the outputs of all.
        """
        single = is_conversation(messages)
        batch: Sequence[Any] = [messages] if single else listed(messages) or []
        each = read_params(len(batch), sampling_params, self._chat_params)
        requests: list[ChatRequest] = []
        for index, (one, params) in enumerate(zip(batch, each, strict=True)):
            try:
                requests.append(self._chat.request(one, params, options))
            except RequestError as error:
                raise (error if single else RequestError(f"conversation {index}: {error}")) from None
        outputs = self.generate(
            [request.prompt for request in requests],
            [request.params for request in requests],
            priority=priority,
            timeout_s=timeout_s,
        )
        return [with_messages(output, request) for output, request in zip(outputs, requests, strict=True)]

    def chat_stream(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Generator[Delta, None, None]:
        """Answer one conversation step by step; `message` of each delta is what the answer gained.

        Arguments and errors as for `chat`, and `stream`.
        """
        request = self.chat_request(messages, sampling_params, **options)
        return with_message_deltas(
            request, self.stream(request.prompt, request.params, priority=priority, timeout_s=timeout_s)
        )

    def chat_request(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatRequest:
        """Return what `chat` would run: prompt and parameters. Arguments and errors as for `chat`."""
        params = self._chat_params if sampling_params is None else sampling_params
        return self._chat.request(messages, params, options)

    @property
    def _chat_params(self) -> SamplingParams:
        return replace(self.default_sampling_params, max_tokens=None)
