"""One request while it is served: its tokens, how far they are computed, and its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from seekforge.runtime.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(eq=False)
class Sequence:
    """State of one request. The scheduler owns `num_computed`, `blocks` and `finish_reason`.

    Attributes:
        request_id: unique among living requests.
        prompt_ids: at least one token.
        params: what was asked.
        seed: of the draws; `params.seed`, or one drawn when that is None.
        stop_ids: tokens that end the request.
        output_ids: tokens generated so far.
        num_computed: positions whose keys are in the cache.
        blocks: block table.
        started_s, first_token_s, last_token_s: monotonic times, set by whoever runs the steps.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and generated."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that the model has not seen yet: 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def max_num_tokens(self) -> int:
        """Most tokens this request can reach."""
        return len(self.prompt_ids) + self.params.max_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the known tokens at positions [start, stop)."""
        split = len(self.prompt_ids)
        return [*self.prompt_ids[start:stop], *self.output_ids[max(start - split, 0) : max(stop - split, 0)]]

    def banned_ids(self) -> frozenset[int]:
        """Tokens that the next draw must not choose."""
        return self.stop_ids if len(self.output_ids) < self.params.min_tokens else frozenset()

    def append(self, token: int) -> None:
        """Take a generated token and decide whether it is the last."""
        self.output_ids.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.params.max_tokens:
            self.finish_reason = "length"
