"""From a prompt and its parameters to a request on its way, or a refusal before any work is done."""

from __future__ import annotations

import functools
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from seekforge.common.errors import RequestError
from seekforge.runtime.arguments import Prompt, read_prompt
from seekforge.runtime.block_table import BlockTable
from seekforge.runtime.chat import markup
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.engine.kv_cache import root_digest
from seekforge.runtime.engine.outputs import Delta
from seekforge.runtime.engine.request import RequestState
from seekforge.runtime.engine.scheduler import Scheduler
from seekforge.runtime.sampling.bad_words import BadWords, Bans
from seekforge.runtime.sampling.guided import Grammars
from seekforge.runtime.sampling.params import SamplingParams, completion_seed
from seekforge.runtime.sampling.reasoning import AfterReasoning, ThinkingBudget
from seekforge.runtime.sequence import Grammar
from seekforge.runtime.sequence import Sequence as _Sequence
from seekforge.runtime.text.detokenizer import TextStream
from seekforge.runtime.text.segments import SegmentedText
from seekforge.runtime.values import shown

#: How many sets of bad words are kept ready.
_KEPT = 32
#: A prompt that is truncated may have so many times the tokens that the engine takes.
_CUT_FROM = 8


@dataclass(frozen=True)
class Accepted:
    """A request that can be served.

    Attributes:
        prompt: the text that was given; None where token ids were.
        prompt_ids: what is computed of it.
        params: the parameters, with `max_tokens` filled in.
        grammar: makes a matcher of the form that the text must have; None where it is free.
    """

    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    grammar: Callable[[], Grammar] | None = None


class InputProcessor:
    """Checks and makes requests for one engine.

    Attributes:
        num_requests: completions that were made so far; they are numbered so.
        weight_version: counts the weights that were swapped in: blocks of other weights are other blocks.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        *,
        tap_names: Mapping[str, Sequence[str]],
        drafting: Callable[[], bool],
        prefix_caching: bool,
    ) -> None:
        """Make one; no weight is needed until a request runs.

        Args:
            engine: opened.
            scheduler: says what can run at all.
            tap_names: kind of tap -> names of the model's outputs.
            drafting: whether a request that is made now drafts.
            prefix_caching: whether requests share what begins alike.
        """
        self.num_requests = 0
        self.weight_version = 0
        self._engine, self._scheduler = engine, scheduler
        self._tap_names, self._drafting = tap_names, drafting
        self._tokenizer = engine.tokenizer
        self._prefix_caching = prefix_caching
        self._numbers = itertools.count()
        self._bans_of = functools.lru_cache(_KEPT)(self._make_bans)

    def check(self, prompt: Prompt, params: SamplingParams, *, in_reasoning: bool = False) -> Accepted:
        """Encode one prompt and refuse it if it cannot be served.

        Args:
            prompt: what is continued.
            params: the sampling parameters.
            in_reasoning: whether a prompt that is encoded ends inside a thought; text in segments says so itself.

        Raises:
            RequestError: it cannot.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {shown(params)}, expected SamplingParams")
        vocab_size, most = self._engine.manifest.vocab_size, self._scheduler.max_num_tokens
        content = read_prompt(prompt)
        # what is cut off has to be encoded as well, since where tokens begin depends on what is before them
        longest = most if params.truncate_prompt_tokens is None else _CUT_FROM * most
        if isinstance(content, tuple):
            ids = content
        elif isinstance(content, SegmentedText):
            ids = tuple(self._tokenizer.encode_segments(content, longest))
        else:
            ids = tuple(self._tokenizer.encode_at_most(content, longest))
        named = (
            ("prompt token", ids),
            ("stop_token_ids entry", params.stop_token_ids),
            ("allowed_token_ids entry", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias),
        )
        for name, tokens in named:
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name} {token} is out of range, expected 0 to {vocab_size - 1}")
        ends = {*params.stop_token_ids, *self._engine.manifest.eos_token_ids}
        if params.min_tokens and params.allowed_token_ids is not None and ends.issuperset(params.allowed_token_ids):
            raise RequestError(
                "allowed_token_ids has only tokens that end the request, which min_tokens forbids; allow others too"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab_size:
                raise RequestError(f"{name} is {getattr(params, name)}, expected at most {vocab_size}, or -1 for all")
        for kind in params.taps:
            if not self._tap_names.get(kind):
                raise RequestError(f"taps asks for {kind}, which this engine does not give; build it with taps")
        if params.truncate_prompt_tokens is not None:
            room = max(most - (params.max_tokens or 1), 1)
            ids = ids[-(room if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens) :]
        if params.max_tokens is None:
            params = replace(params, max_tokens=max(most - len(ids), 1, params.min_tokens))
        assert params.max_tokens is not None
        self._scheduler.check_request(len(ids), params.max_tokens)
        gated = content.in_reasoning if isinstance(content, SegmentedText) else in_reasoning
        if params.thinking_token_budget is not None:
            self._thought_ids()
            if params.structured_outputs is not None and not gated:
                raise RequestError(
                    "thinking_token_budget and structured_outputs go together in chat alone, where the form begins "
                    "behind the thought; leave one of them out"
                )
        form = params.structured_outputs
        grammar = None if form is None else self._grammars.compile(form, params.max_tokens)
        if grammar is not None and gated:
            grammar = functools.partial(self._after_reasoning, grammar)
        self._bans(params)
        return Accepted(None if isinstance(content, tuple) else str(content), ids, params, grammar)

    def make(
        self,
        request: Accepted,
        priority: int,
        timeout_s: float | None,
        on_delta: Callable[[Delta], None] | None,
    ) -> RequestState:
        """Return a request that was checked."""
        params, ends = request.params, self._engine.manifest.eos_token_ids
        early_ids = frozenset((*params.stop_token_ids, *ends))
        stop_ids = frozenset(params.stop_token_ids) if params.ignore_eos else early_ids
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        now = time.monotonic()
        bans = self._bans(params)
        allowed = None
        if params.allowed_token_ids is not None:
            allowed = np.zeros(self._engine.manifest.vocab_size, bool)
            allowed[list(params.allowed_token_ids)] = True
        sequences: list[_Sequence] = []
        texts: list[TextStream] = []
        owner = self.num_requests + 1
        for index in range(params.num_sequences):
            self.num_requests += 1
            text = TextStream(
                self._tokenizer,
                params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                stop_ids=stop_ids,
            )
            sequence = _Sequence(
                self.num_requests,
                request.prompt_ids,
                params,
                seed=completion_seed(seed, index),
                stop_ids=stop_ids,
                early_ids=early_ids,
                priority=priority,
                deadline_s=None if timeout_s is None else now + timeout_s,
                on_token=text.push if params.detokenize else None,
                grammar=None if request.grammar is None else request.grammar(),
                thinking=self._budget(params, request.prompt_ids),
                bad_words=None if bans is None else BadWords(bans),
                allowed=allowed,
                token_text=self._tokenizer.token_text if params.detokenize else None,
                speculates=self._drafting(),
                weight_version=self.weight_version,
                table=BlockTable(b"", owner=owner),
                arrived_s=now,
            )
            sequence.table.root = self.root(sequence)
            sequences.append(sequence)
            texts.append(text)
        sequences[0].siblings = tuple(sequences[1:])
        number = str(next(self._numbers))
        quiet_end = None if params.ignore_eos else ends[0]
        return RequestState(number, request.prompt, params, quiet_end, tuple(sequences), tuple(texts), on_delta)

    def root(self, sequence: _Sequence) -> bytes:
        """Return the start of its blocks' digests: what their contents depend on besides tokens."""
        manifest = self._engine.manifest
        facts = (manifest.program_sha256, manifest.numerics, manifest.cache.kv_format, self.weight_version)
        alone = None if self._prefix_caching else sequence.table.owner
        return root_digest(*facts, sequence.speculates, alone)

    def _thought_ids(self) -> tuple[int, int]:
        """Return the tokens that begin and end a thought.

        Raises:
            RequestError: the vocabulary has none.
        """
        start, end = map(self._tokenizer.token_id, (markup.THINK_START, markup.THINK_END))
        if start is None or end is None:
            raise RequestError(
                f"thinking needs the tokens {markup.THINK_START} and {markup.THINK_END}, which this vocabulary lacks"
            )
        return start, end

    def _budget(self, params: SamplingParams, prompt_ids: Sequence[int]) -> ThinkingBudget | None:
        if params.thinking_token_budget is None:
            return None
        return ThinkingBudget(params.thinking_token_budget, *self._thought_ids(), prompt_ids)

    def _after_reasoning(self, grammar: Callable[[], Grammar]) -> Grammar:
        """Return the grammar of a completion that begins inside a thought."""
        return AfterReasoning(grammar(), self._thought_ids()[1], self._thought)

    @cached_property
    def _thought(self) -> np.ndarray:
        """[vocab_size] bool: what a thought may hold, and what ends it."""
        manifest = self._engine.manifest
        mask = np.ones(manifest.vocab_size, bool)
        mask[list(manifest.eos_token_ids)] = False
        return mask

    @cached_property
    def _grammars(self) -> Grammars:
        manifest = self._engine.manifest
        return Grammars(self._tokenizer, manifest.vocab_size, manifest.eos_token_ids)

    def _bans(self, params: SamplingParams) -> Bans | None:
        """Return what bans the bad words; made once for all requests that ban the same."""
        if not params.bad_words:
            return None
        hidden = self._tokenizer.special_ids if params.skip_special_tokens else frozenset()
        if not params.include_stop_str_in_output:
            hidden |= {*params.stop_token_ids, *(() if params.ignore_eos else self._engine.manifest.eos_token_ids)}
        return self._bans_of(tuple(params.bad_words), hidden)

    def _make_bans(self, words: tuple[str, ...], hidden: frozenset[int]) -> Bans:
        return Bans(words, self._tokenizer.vocabulary, hidden)
