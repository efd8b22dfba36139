"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from seekforge.common.errors import EngineError
from seekforge.runtime.chat.messages import Message, MessageDelta
from seekforge.runtime.sequence import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost.

    Attributes:
        queue_s: seconds from its arrival to its first step.
        prefill_tokens, prefill_s: the prompt, from its first step to its first generated token.
        decode_tokens, decode_s: the generated tokens after the first, of all completions, to the last.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        preemptions: how often it lost its blocks and was computed anew.
    """

    queue_s: float
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Usage:
    """Tokens, counted as the OpenAI interface does; all completions that were generated."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        text: the text of `token_ids`, without special tokens, and without the stop string or stop token that ended it;
            what `skip_special_tokens` and `include_stop_str_in_output` ask for is there.
        token_ids: all that were generated, the one that ended the request included.
        finish_reason: "stop" (end of sequence, stop token or stop string), "length" (max_tokens), "timeout", "abort" or
            "error".
        stop_reason: the stop string, or the stop token, that ended it; None for the model's end of sequence and other
            finish reasons.
        index: the place of the completion among the request's outputs.
        cumulative_logprob: sum over `token_ids`; None unless `logprobs` or `best_of` was asked.
        logprobs: log-probabilities of each token; None unless they were requested.
        taps: name ("expert_ids.3") -> [positions, k]: what was chosen at each position of prompt and completion but
            the last token's, which the model has not seen. Empty unless asked.
        weight_version: how often weights had been updated when its first token was chosen.
        weight_changes: for each update since then, how many of its tokens had been chosen before.
        error: what went wrong, with finish_reason "error".
        message: the answer to a conversation, read from `text`; None of other prompts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    index: int = 0
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    taps: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    error: str | None = None
    message: Message | None = None
    weight_version: int = 0
    weight_changes: tuple[int, ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: a number that no other request of this `LLM` has.
        prompt: the text that was given; None where token ids were.
        prompt_token_ids: what was computed: with `truncate_prompt_tokens` the end of the prompt.
        finished: always true: what a stream has so far is in its deltas.
        outputs: `n` completions; of `best_of` ones the best, best first.
        prompt_logprobs: log-probabilities of each token of the prompt, None for the first; None unless requested.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finished: bool = True

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return self.metrics.cached_tokens


@dataclass(frozen=True)
class Delta:
    """What a stream gained by one step.

    Attributes:
        text: may be empty: a character can need several tokens, and a stop string is held back. Joined, the texts of
            one completion are its whole text.
        token_ids: the new tokens.
        output: the whole request, in the last delta only.
        index: the index of the completion.
        finish_reason, stop_reason: why that completion ended, in its last delta.
        logprobs: log-probabilities of the new tokens; empty unless they were requested.
        message: what the answer to a conversation gained; None of other prompts.
    """

    text: str
    token_ids: tuple[int, ...]
    output: RequestOutput | None = None
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: int | str | None = None
    message: MessageDelta | None = None


class GenerationError(EngineError):
    """Requests failed while others may have ended well.

    Attributes:
        outputs: the outputs of all requests, in their order; the failed have a completion with `finish_reason` "error".
    """

    def __init__(self, message: str, outputs: list[RequestOutput]) -> None:
        super().__init__(message)
        self.outputs = outputs
