"""One completion while it is generated: its tokens, how far they are computed, and its blocks."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.sampling.bad_words import BadWords
from seekforge.runtime.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
#: "new": not yet given to a scheduler.
State = Literal["new", "waiting", "running", "finished"]


class Budget(Protocol):
    """When a thought has to end (`reasoning.ThinkingBudget`)."""

    def forced(self) -> int | None:
        """Return the token that has to be next; None: any may be."""
        ...

    def advance(self, token: int) -> None:
        """Take a token."""
        ...


class Grammar(Protocol):
    """What guided decoding allows next (`guided.Matcher`)."""

    def allowed(self) -> np.ndarray:
        """Return [vocab_size] bool: the tokens that may come next."""
        ...

    def advance(self, token: int) -> None:
        """Take a token that was allowed."""
        ...


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position.

    Attributes:
        logprob: log-probability by the model alone, before temperature, penalties, bias and grammar.
        rank: 1 for the likeliest token; of equally likely ones the lowest id comes first.
        decoded_token: what the token looks like by itself; None with `detokenize=False`.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs(Mapping[int, Logprob]):
    """Log-probabilities at one position: a mapping from token id to `Logprob`, that of the token there first.

    Attributes:
        token_id: the token that stands there.
        logprob, rank: log-probability and rank of that token.
        top: the most likely tokens with theirs, falling; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
    token_text: Callable[[int], str] | None = field(default=None, repr=False, compare=False)

    @property
    def decoded_token(self) -> str | None:
        """What the token looks like by itself; None with `detokenize=False`."""
        return None if self.token_text is None else self.token_text(self.token_id)

    def __getitem__(self, token: int) -> Logprob:
        text = None if self.token_text is None else self.token_text(token)
        if token == self.token_id:
            return Logprob(self.logprob, self.rank, text)
        for rank, (other, value) in enumerate(self.top, 1):
            if other == token:
                return Logprob(value, rank, text)
        raise KeyError(token)

    def __iter__(self) -> Iterator[int]:
        yield self.token_id
        yield from (token for token, _ in self.top if token != self.token_id)

    def __len__(self) -> int:
        return len(self.top) + all(token != self.token_id for token, _ in self.top)

    def items(self) -> ItemsView[int, Logprob]:
        """Return the pairs, made at once: looking each token up by itself would take the square of their number."""
        text = self.token_text or (lambda _: None)
        pairs = {self.token_id: Logprob(self.logprob, self.rank, text(self.token_id))}
        for rank, (token, value) in enumerate(self.top, 1):
            if token != self.token_id:
                pairs[token] = Logprob(value, rank, text(token))
        return pairs.items()

    def values(self) -> ValuesView[Logprob]:
        """Return those of all tokens."""
        return dict(self.items()).values()


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one completion. The scheduler owns `state`, `num_computed`, `table` and `finish_reason`.

    Attributes:
        request_id: unique among living sequences.
        prompt_ids: the tokens of the prompt, at least one.
        params: what was asked.
        seed: the seed of the draws.
        stop_ids: tokens that end it.
        priority: lower is served sooner.
        deadline_s: monotonic time at which it is ended; None is never.
        on_token: called with each generated token; returns whether it completes a stop string.
        grammar: restricts the next token.
        thinking: says when a thought has to end; None: it never has to.
        bad_words: what must not be generated.
        allowed: [vocab_size] bool, the only tokens that may be chosen; None: all.
        early_ids: like those of `stop_ids`, they cannot be chosen before `min_tokens`: the ends of sequence also where
            they are ignored.
        token_text: gives the text of a token, for log-probabilities; None: it is not wanted.
        max_tokens: most tokens to generate; 0 takes what `params` say.
        speculates: whether tokens are drafted for it.
        siblings: sequences of the same request, which start when this one's prompt is computed and then share it.
        table: the cache blocks of the sequence.
        order: place in the queue: lower goes first.
        output_ids: tokens generated so far.
        num_tokens: tokens known, prompt and generated.
        num_computed: positions whose keys are in the cache.
        drafts: guesses for the tokens that follow, verified by the next step.
        last_id: the last known token.
        cumulative_logprob: sum over the generated tokens, kept when `logprobs` or `best_of` need it.
        logprobs, prompt_logprobs: filled when asked for; the prompt's first token has none.
        taps: name -> pieces (first position, rows), in the order they were computed.
        num_cached_tokens: positions that the last admission found in the cache.
        num_preemptions: how often it lost its blocks.
        weight_version: the version of the weights that chose its first token; before it has one, those that will.
        weight_changes: for each update of the weights since, how many tokens it had.
        error: what went wrong, with finish_reason "error".
        arrived_s, started_s, first_token_s, last_token_s: monotonic times.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline_s: float | None = None
    on_token: Callable[[int], bool] | None = None
    grammar: Grammar | None = None
    thinking: Budget | None = None
    bad_words: BadWords | None = None
    allowed: np.ndarray | None = None
    early_ids: frozenset[int] = frozenset()
    token_text: Callable[[int], str] | None = None
    max_tokens: int = 0
    speculates: bool = False
    siblings: tuple[Sequence, ...] = ()
    table: BlockTable = field(default_factory=lambda: BlockTable(b""))
    order: tuple[int, int] = (0, 0)
    state: State = "new"
    output_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)
    last_id: int = 0
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    taps: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    weight_version: int = 0
    weight_changes: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    arrived_s: float | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.max_tokens = self.max_tokens or self.params.max_tokens or 0
        self.num_tokens = len(self.prompt_ids) + len(self.output_ids)
        self.last_id = self.output_ids[-1] if self.output_ids else self.prompt_ids[-1] if self.prompt_ids else 0

    @property
    def num_pending(self) -> int:
        """Known tokens that the model has not seen yet: 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def max_num_tokens(self) -> int:
        """Most tokens this sequence can reach."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def reads_cache(self) -> bool:
        """Whether positions found in the prefix cache may be skipped: not when something of each is wanted."""
        params = self.params
        return params.prompt_logprobs is None and not params.taps and not params.skip_reading_prefix_cache

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the known tokens at positions [start, stop)."""
        split = len(self.prompt_ids)
        if stop <= split:
            return list(self.prompt_ids[start:stop])
        return [*self.prompt_ids[start:split], *self.output_ids[max(start - split, 0) : stop - split]]

    def append(self, token: int) -> None:
        """Take a generated token and decide whether it is the last."""
        self.output_ids.append(token)
        self.num_tokens += 1
        self.last_id = token
        if self.grammar is not None:
            self.grammar.advance(token)
        if self.thinking is not None:
            self.thinking.advance(token)
        completes = self.on_token is not None and self.on_token(token)
        count = len(self.output_ids)
        if token in self.stop_ids or completes:
            self.finish_reason = "stop"
        elif count >= self.max_tokens:
            self.finish_reason = "length"
