"""A request on its way: its sequences with their texts, what is new about them, and its result."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from seekforge.runtime.engine.outputs import (
    CompletionOutput,
    Delta,
    GenerationError,
    RequestMetrics,
    RequestOutput,
    Usage,
)
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.sequence import Sequence
from seekforge.runtime.text.detokenizer import TextStream


@dataclass(eq=False)
class RequestState:
    """A request on its way.

    Attributes:
        request_id: a number that no other request has.
        prompt: the text that was given; None where token ids were.
        params: what was asked.
        eos_token_id: the end of sequence that is no reason worth telling; None where it is ignored.
        sequences, texts: sequence and text of each of its completions.
        on_delta: called with each delta; None: deltas are collected in `unread`.
        unread: deltas that nobody has read yet.
        output: the result, once all sequences have ended.
    """

    request_id: str
    prompt: str | None
    params: SamplingParams
    eos_token_id: int | None
    sequences: tuple[Sequence, ...]
    texts: tuple[TextStream, ...]
    on_delta: Callable[[Delta], None] | None = None
    unread: deque[Delta] = field(default_factory=deque)
    output: RequestOutput | None = None

    def __post_init__(self) -> None:
        # tokens of each that are in deltas; −1: it has ended
        self._num_emitted = [0] * len(self.sequences)

    def deliver(self, sequence: Sequence) -> None:
        """Make the delta of what one of its sequences gained."""
        index = self.sequences.index(sequence)
        start = self._num_emitted[index]
        if start < 0:
            return
        finished = sequence.finish_reason is not None
        new = tuple(sequence.output_ids[start:])
        self._num_emitted[index] = -1 if finished else start + len(new)
        self._hand_on(index, self.texts[index].take(final=finished), start, new)

    def fail(self, sequence: Sequence) -> None:
        """Make the last delta of a sequence that has ended where `deliver` cannot: without text, and for sure."""
        index = self.sequences.index(sequence)
        if self._num_emitted[index] >= 0:
            start, self._num_emitted[index] = self._num_emitted[index], -1
            with contextlib.suppress(Exception):  # the listener may be what failed
                self._hand_on(index, "", start, tuple(sequence.output_ids[start:]))

    def _hand_on(self, index: int, text: str, start: int, new: tuple[int, ...]) -> None:
        sequence = self.sequences[index]
        if max(self._num_emitted) < 0:
            self.output = _output(self)
        delta = Delta(
            text,
            new,
            self.output,
            index,
            sequence.finish_reason,
            tuple(sequence.logprobs[start:]),
            _stop_reason(self, index),
        )
        if self.on_delta is not None:
            self.on_delta(delta)
        else:
            self.unread.append(delta)


def raise_if_failed(delta: Delta) -> None:
    """Raise what ended a stream in place of its last delta.

    Raises:
        GenerationError: the engine failed on it.
    """
    if delta.output is not None:
        for completion in delta.output.outputs:
            if completion.finish_reason == "error":
                raise GenerationError(completion.error or "the request failed", [delta.output])


def _output(live: RequestState) -> RequestOutput:
    """Return the result of a request whose sequences have all ended."""
    params, first = live.params, live.sequences[0]
    completions = [_completion(live, index) for index in range(len(live.sequences))]
    if params.best_of is not None:
        completions.sort(key=lambda c: -(c.cumulative_logprob or 0.0) / max(len(c.token_ids), 1))
        completions = [replace(one, index=place) for place, one in enumerate(completions[: params.n])]
    generated = sum(len(s.output_ids) for s in live.sequences)
    arrived = first.arrived_s or 0.0
    started = first.started_s if first.started_s is not None else arrived
    begun = first.first_token_s if first.first_token_s is not None else started
    ended = max((s.last_token_s for s in live.sequences if s.last_token_s is not None), default=begun)
    metrics = RequestMetrics(
        queue_s=started - arrived,
        prefill_tokens=len(first.prompt_ids),
        prefill_s=begun - started,
        decode_tokens=max(generated - 1, 0),
        decode_s=ended - begun,
        cached_tokens=min(first.num_cached_tokens, len(first.prompt_ids)),
        preemptions=sum(s.num_preemptions for s in live.sequences),
    )
    return RequestOutput(
        live.request_id,
        live.prompt,
        first.prompt_ids,
        tuple(completions),
        metrics,
        Usage(len(first.prompt_ids), generated),
        tuple(first.prompt_logprobs or [None]) if params.prompt_logprobs is not None else None,
    )


def _completion(live: RequestState, index: int) -> CompletionOutput:
    sequence, params = live.sequences[index], live.params
    assert sequence.finish_reason is not None
    counted = params.logprobs is not None or params.best_of is not None
    return CompletionOutput(
        live.texts[index].text,
        tuple(sequence.output_ids),
        sequence.finish_reason,
        _stop_reason(live, index),
        index,
        sequence.cumulative_logprob if counted else None,
        tuple(sequence.logprobs) if params.logprobs is not None else None,
        {name: _joined(pieces, sequence.num_tokens - 1) for name, pieces in sequence.taps.items()},
        sequence.error,
        weight_version=sequence.weight_version,
        weight_changes=tuple(sequence.weight_changes),
    )


def _stop_reason(live: RequestState, index: int) -> int | str | None:
    sequence, stop_reason = live.sequences[index], live.texts[index].stop_reason
    if sequence.finish_reason != "stop" or stop_reason is not None:
        return stop_reason if sequence.finish_reason == "stop" else None
    return None if sequence.last_id == live.eos_token_id else sequence.last_id


def _joined(pieces: list[tuple[int, np.ndarray]], num_positions: int) -> np.ndarray:
    """Join what steps gave at their positions; a later step replaces what an earlier one drafted."""
    out = np.full((num_positions, pieces[0][1].shape[1]), -1, pieces[0][1].dtype)
    for start, rows in pieces:
        out[start : start + len(rows)] = rows[: max(num_positions - start, 0)]
    return out
