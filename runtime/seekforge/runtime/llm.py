"""The public face: `LLM(engine).generate(prompts, SamplingParams(...))`.

Nothing is added to a prompt: text is encoded as it is, special tokens written in it become their ids, and the
begin-of-sequence token is there only if the text holds it.

Any thread may call. One of those that wait for tokens runs the next step, for the requests of all.
"""

from __future__ import annotations

import operator
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import numpy as np

from seekforge.plugins.errors import EngineError, RequestError
from seekforge.plugins.formats.manifest import Manifest
from seekforge.runtime.backends.deterministic import DeterministicBackend
from seekforge.runtime.chat import ChatEncoder
from seekforge.runtime.core import Core, StepMetrics
from seekforge.runtime.engine import Engine
from seekforge.runtime.guided import Grammars
from seekforge.runtime.kv_cache import BlockPool, KvCache, Table, blocks_needed, root_digest
from seekforge.runtime.outputs import CompletionOutput, Delta, GenerationError, RequestMetrics, RequestOutput, Usage
from seekforge.runtime.sampling import TAPS, SamplingParams
from seekforge.runtime.scheduler import Scheduler
from seekforge.runtime.self_check import SelfCheckResult, run_self_check
from seekforge.runtime.sequence import FinishReason
from seekforge.runtime.sequence import Sequence as _Sequence
from seekforge.runtime.speculative import MAX_DRAFTS, SpeculationMetrics, SpeculationSwitch, Speculator
from seekforge.runtime.text import TextStream

#: Part of the free memory that caches take when no size is asked for.
_CACHE_SHARE = 0.5
#: Distance between the seeds of the completions of one request.
_SEED_STEP = 0x9E3779B97F4A7C15

Prompt = str | Sequence[int]


@dataclass(eq=False)
class _Live:
    """A request on its way: its sequences with their texts, and deltas that nobody has read yet."""

    params: SamplingParams
    sequences: tuple[_Sequence, ...]
    texts: tuple[TextStream, ...]
    num_emitted: list[int]
    num_unfinished: int
    unread: deque[Delta] = field(default_factory=deque)
    output: RequestOutput | None = None
    on_delta: Callable[[Delta], None] | None = None


@dataclass(frozen=True)
class LLMMetrics:
    """Counters since the start.

    Attributes:
        num_steps, step_s: iterations and their time.
        num_prefill_tokens, num_decode_tokens: computed.
        num_sampled: tokens generated.
        num_queried_tokens, num_hit_tokens: known tokens of admitted requests, and those found in the prefix cache.
        num_preemptions: requests that lost their blocks.
        drafts_proposed, drafts_accepted: by position of the draft; empty without speculation.
        num_running, num_waiting, num_free_blocks: now.
    """

    num_steps: int
    step_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_sampled: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_preemptions: int
    drafts_proposed: tuple[int, ...]
    drafts_accepted: tuple[int, ...]
    num_running: int
    num_waiting: int
    num_free_blocks: int


class LLM:
    """A loaded engine that answers requests, from any thread. Close it, or use it as a context manager.

    Attributes:
        engine: the engine folder.
        max_model_len: most tokens of one request, prompt and generated.
        max_batch_size: most completions that run at the same time; more wait.
        num_blocks: cache blocks, the scrap block included.
        num_speculative_tokens: drafts per step; 0 is no speculation.
        self_check: its result; None when it was switched off or the engine stores none.
        default_sampling_params: what the checkpoint recommends.

    Example:
        >>> with LLM("engine/", num_speculative_tokens=3) as llm:
        ...     (output,) = llm.generate("Once upon a time", SamplingParams(max_tokens=64, stop=["The end"]))
        ...     print(output.outputs[0].text, output.outputs[0].finish_reason)
    """

    def __init__(
        self,
        engine: Engine | Path | str,
        *,
        max_model_len: int | None = None,
        max_batch_size: int | None = None,
        max_num_batched_tokens: int | None = None,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        num_speculative_tokens: int = 0,
        speculation_off_switch: bool = True,
        prefix_caching: bool = True,
        max_waiting: int | None = None,
        deterministic: bool = False,
        threads: int | None = None,
        checkpoint: Path | str | None = None,
        self_check: bool = True,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> None:
        """Load an engine.

        Args:
            engine: an opened engine or its folder.
            max_model_len: at most the engine's limit. None: that limit, or what the cache holds if less.
            max_batch_size: at most the engine's limit, which None takes.
            max_num_batched_tokens: tokens of one step; longer prompts are run in chunks. As above.
            num_blocks: size of the cache in blocks of 64 tokens, the scrap block included.
            kv_cache_memory: size of the cache in bytes, instead of `num_blocks`. With neither, the cache
                holds `max_batch_size` requests of `max_model_len`, but takes at most half of the free memory.
            num_speculative_tokens: tokens to draft with the MTP module, 0 to 5. What is generated stays the same.
            speculation_off_switch: stop drafting while it costs more than it brings.
            prefix_caching: share what is computed between requests that begin alike. Completions of one
                request share their prompt always.
            max_waiting: most completions that wait; more are refused. None sets no bound.
            deterministic: a request gives the same tokens and log-probabilities, bit for bit, alone or in any batch,
                from the prefix cache or anew, chunked or whole, with drafts or without; twice the work. CPU only.
            threads: CPU threads for one operator; None takes the cores this process may use.
            checkpoint: where the weights are, of an engine that holds none (a GPU's); None takes where they were at
                build.
            self_check: compare with the results stored in the engine before serving.
            on_step: told each iteration, by the thread that ran it.

        Raises:
            EngineError: the engine is damaged, fails its self-check, or cannot do what is asked.
            EnvironmentFault: a library that it needs is not installed.
        """
        self.engine = engine if isinstance(engine, Engine) else Engine.open(engine)
        manifest = self.engine.manifest
        limits = manifest.limits
        self.max_batch_size = _limit("max_batch_size", max_batch_size, limits.max_batch_size)
        tokens = _limit("max_num_batched_tokens", max_num_batched_tokens, limits.max_num_batched_tokens)
        self.max_batch_size = min(self.max_batch_size, tokens)
        longest = _limit("max_model_len", max_model_len, limits.max_model_len)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}, expected at least 1")
        self.num_speculative_tokens = _drafts(manifest, num_speculative_tokens)
        self.num_blocks = _num_blocks(manifest, self.max_batch_size, longest, num_blocks, kv_cache_memory)
        block_size = manifest.cache.block_size
        holds = (self.num_blocks - 1) * block_size
        if max_model_len is not None and holds < max_model_len:
            raise EngineError(
                f"max_model_len {max_model_len} needs {self.engine.cache_bytes(max_model_len):,} bytes of cache, "
                f"the cache has {self.num_blocks * manifest.cache.bytes_per_block:,}; lower max_model_len or give more "
                "memory (num_blocks or kv_cache_memory)"
            )
        self.max_model_len = min(longest, holds)
        self.default_sampling_params = SamplingParams(
            temperature=manifest.generation.get("temperature", 1.0), top_p=manifest.generation.get("top_p", 1.0)
        )
        self._tokenizer = self.engine.tokenizer
        self._prefix_caching = prefix_caching
        backend = self.engine.open_backend(threads=threads, checkpoint=None if checkpoint is None else Path(checkpoint))
        if deterministic:
            if manifest.target.backend != "onnxruntime":
                raise EngineError(
                    f"deterministic works on onnxruntime, this engine runs on {manifest.target.backend}; leave it out"
                )
            backend = DeterministicBackend(backend)
        self.self_check: SelfCheckResult | None = None
        if self_check and manifest.self_check is not None:
            self.self_check = run_self_check(backend, manifest.self_check, block_size)
        try:
            backend.allocate_caches(self.num_blocks)
        except MemoryError:
            size = self.num_blocks * manifest.cache.bytes_per_block
            raise EngineError(f"the cache needs {size:,} bytes, which are not free; lower num_blocks") from None
        speculator = None
        if self.num_speculative_tokens:
            speculator = Speculator(backend, self.num_speculative_tokens, block_size, manifest.vocab_size)
        self._scheduler = Scheduler(
            KvCache(BlockPool(self.num_blocks), block_size, lookahead=int(speculator is not None)),
            max_batch_size=self.max_batch_size,
            max_num_batched_tokens=tokens,
            max_model_len=self.max_model_len,
            max_waiting=max_waiting,
        )
        outputs = [spec.name for spec in manifest.graphs["model"].outputs if spec.role == "tap"]
        self._core = Core(
            backend,
            self._scheduler,
            manifest.vocab_size,
            tap_names={kind: tuple(n for n in outputs if n.partition(".")[0] == kind) for kind in TAPS},
            speculator=speculator,
            switch=SpeculationSwitch() if speculation_off_switch and speculator is not None else None,
        )
        self._core.on_step = self._count
        self._on_step = on_step
        self._totals = np.zeros(5)
        self._live: dict[int, _Live] = {}
        self._num_requests = 0
        self._weights_version = 0
        # Guards what follows, and the scheduler while no step is run.
        self._turn = threading.Condition()
        self._stepping = False
        self._closed = False
        self._inbox: deque[Callable[[], None]] = deque()
        self._num_entering = 0

    # --- requests -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer `prompts` together, in as few steps as the engine's limits allow.

        Args:
            prompts: texts or lists of token ids; one alone may be given bare.
            sampling_params: for all of them, or one each; None takes `default_sampling_params`.
            priority: lower is served sooner.
            timeout_s: after this time a request ends with what it has, finish_reason "timeout".

        Returns:
            One output per prompt, in their order.

        Raises:
            RequestError: a prompt cannot be served. All are checked before any work is done.
            GenerationError: the engine failed on some; it holds the outputs of all.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and _is_integer(prompts[0]))
        batch: Sequence[Prompt] = [prompts] if single else prompts  # pyright: ignore[reportAssignmentType]
        each = self._params_for(len(batch), sampling_params)
        encoded: list[tuple[int, ...]] = []
        for index, (prompt, params) in enumerate(zip(batch, each, strict=True)):
            try:
                encoded.append(self._check(prompt, params))
            except RequestError as error:
                raise (error if len(batch) == 1 else RequestError(f"prompt {index}: {error}")) from None
        lives = self._start(list(zip(encoded, each, strict=True)), priority, timeout_s)
        try:
            self._advance(lambda: all(live.output is not None for live in lives))
        finally:
            self._drop(lives)
        outputs = [live.output for live in lives if live.output is not None]
        failed = [(i, c.error) for i, o in enumerate(outputs) for c in o.outputs if c.finish_reason == "error"]
        if failed:
            raise GenerationError(
                f"{len({i for i, _ in failed})} of {len(outputs)} requests failed; "
                f"prompt {failed[0][0]}: {failed[0][1]}",
                outputs,
            )
        return outputs

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Iterator[Delta]:
        """Answer one prompt step by step. Closing the iterator early ends the request.

        Several streams may be read by turns, and `generate` called between: they share the engine's steps.

        Args:
            prompt: text or token ids.
            sampling_params: None takes `default_sampling_params`.
            priority, timeout_s: as for `generate`.

        Returns:
            Deltas; the last one has `output`. With n > 1, those of the completions are mixed.

        Raises:
            RequestError: the prompt cannot be served; raised here, not at the first delta.
            GenerationError: the engine failed; raised in place of the last delta.
        """
        params = sampling_params or self.default_sampling_params
        ids = self._check(prompt, params)
        self._scheduler.check_queue(params.num_sequences)
        return self._stream(ids, params, priority, timeout_s)

    def as_completed(
        self, requests: Iterable[tuple[Prompt, SamplingParams]], *, ahead: int | None = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Answer any number of requests, and give each result when it is there.

        Args:
            requests: prompt and parameters; read as the engine gets to them.
            ahead: how many are read before the first of them is done; None takes four times `max_batch_size`.

        Returns:
            (number of the request, its output), in the order in which they end. A failed one has a completion with
            `finish_reason` "error".

        Raises:
            RequestError: a request cannot be served; those on their way are ended.
        """
        most = ahead or 4 * self.max_batch_size
        source = enumerate(requests)
        lives: dict[int, _Live] = {}
        try:
            while True:
                while len(lives) < most and (entry := next(source, None)) is not None:
                    number, (prompt, params) = entry
                    (lives[number],) = self._start([(self._check(prompt, params), params)], 0, None)
                if not lives:
                    return
                self._advance(lambda: any(live.output is not None for live in lives.values()))
                ended = [number for number, live in lives.items() if live.output is not None]
                for number in ended:
                    live = lives.pop(number)
                    self._drop([live])
                    assert live.output is not None
                    yield number, live.output
        finally:
            self._drop(list(lives.values()))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """Answer a conversation.

        Args:
            messages: role and content each, as in the OpenAI interface; also tools, tool_calls, reasoning_content.
            sampling_params: None takes `default_sampling_params`.
            thinking: let the model reason first.
            priority, timeout_s: as for `generate`.

        Raises:
            RequestError: messages that cannot stand like this, or as for `generate`.
            EngineError: the engine carries no chat encoding.
        """
        prompt = self.chat_prompt(messages, thinking=thinking)
        return self.generate(prompt, sampling_params, priority=priority, timeout_s=timeout_s)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], *, thinking: bool = False) -> str:
        """Return the text that `chat` would continue."""
        return self._chat.encode(messages, thinking=thinking)

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Swap weights between two steps; the engine is not built again. What is cached is dropped.

        Requests on their way go on with the new weights; their tokens so far are computed anew.

        Args:
            tensors: checkpoint tensor name -> new value, in the checkpoint's shape and dtype. A weight that is
                computed from several tensors (all experts of a layer; a weight and its scales) needs all of them.

        Raises:
            EngineError: a name, shape or dtype is wrong, a tensor that belongs to them is missing, or the backend
                cannot do this; nothing is changed.
        """
        with self._exclusive():
            self._core.backend.update_weights(tensors)
            self._weights_version += 1
            self._scheduler.restart(self._root)

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Refuse a request that cannot be served, and do nothing else.

        Raises:
            RequestError: it cannot.
        """
        self._check(prompt, params)

    def metrics(self) -> LLMMetrics:
        """Return the counters."""
        steps, seconds, prefill, decode, sampled = self._totals.tolist()
        drafts = self._core.speculator.metrics if self._core.speculator else SpeculationMetrics([], [])
        cache = self._scheduler.cache
        return LLMMetrics(
            int(steps),
            seconds,
            int(prefill),
            int(decode),
            int(sampled),
            cache.num_queried_tokens,
            cache.num_hit_tokens,
            self._scheduler.num_preemptions,
            tuple(drafts.proposed),
            tuple(drafts.accepted),
            self._scheduler.num_running,
            self._scheduler.num_waiting,
            cache.pool.num_free,
        )

    def close(self) -> None:
        """Give back the engine's memory. Requests on their way are ended."""
        if self._closed:
            return
        with self._exclusive():
            self._closed = True
            self._end_all("abort", None)
            self._core.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- from a prompt to a live request --------------------------------------------------------------------

    def _params_for(
        self, count: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_sampling_params] * count
        if len(given) != count:
            raise RequestError(f"{len(given)} sampling_params for {count} prompts; pass one, or one each")
        return given

    def _check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """Encode one prompt and refuse it if it cannot be served."""
        vocab_size = self.engine.manifest.vocab_size
        ids = tuple(self._tokenizer.encode(prompt) if isinstance(prompt, str) else map(_token_id, prompt))
        named = (
            ("prompt token", ids),
            ("stop_token_ids entry", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        )
        for name, tokens in named:
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name} {token} is out of range, expected 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab_size:
                raise RequestError(f"{name} is {getattr(params, name)}, expected at most {vocab_size}")
        for kind in params.taps:
            if not self._core.tap_names.get(kind):
                raise RequestError(f"taps asks for {kind}, which this engine does not give; build it with taps")
        if params.guided is not None:
            self._grammars.matcher(params.guided)
        self._scheduler.check_request(len(ids), params.max_tokens)
        return ids

    @cached_property
    def _grammars(self) -> Grammars:
        manifest = self.engine.manifest
        return Grammars(self.engine.folder / manifest.tokenizer, manifest.vocab_size, manifest.eos_token_id)

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.engine.folder, self.engine.manifest)

    def _root(self, sequence: _Sequence) -> bytes:
        """Return the start of its blocks' digests: what their contents depend on besides tokens."""
        manifest = self.engine.manifest
        facts = (manifest.program_sha256, manifest.numerics, manifest.cache.kv_format, self._weights_version)
        alone = None if self._prefix_caching else sequence.table.owner
        return root_digest(*facts, sequence.speculates, alone)

    def _start(
        self,
        requests: Sequence[tuple[tuple[int, ...], SamplingParams]],
        priority: int,
        timeout_s: float | None,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[_Live]:
        """Put requests into the queue, all or none."""
        with self._turn:
            if self._closed:
                raise EngineError("this LLM is closed; open another one")
            total = sum(params.num_sequences for _, params in requests)
            self._scheduler.check_queue(total + self._num_entering)
            lives = [self._make(ids, params, priority, timeout_s, on_delta) for ids, params in requests]
            self._num_entering += total
            for live in lives:
                self._inbox.append(lambda live=live: self._enter(live))
            if not self._stepping:
                self._empty_inbox()
            self._turn.notify_all()
        return lives

    def _make(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        priority: int,
        timeout_s: float | None,
        on_delta: Callable[[Delta], None] | None,
    ) -> _Live:
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= {self.engine.manifest.eos_token_id}
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        now = time.monotonic()
        bad_words = tuple(ids for word in params.bad_words for ids in self._spellings(word))
        sequences: list[_Sequence] = []
        texts: list[TextStream] = []
        owner = self._num_requests + 1
        for index in range(params.num_sequences):
            self._num_requests += 1
            text = TextStream(
                self._tokenizer, params.stop, include_stop=params.include_stop, min_tokens=params.min_tokens
            )
            sequence = _Sequence(
                self._num_requests,
                prompt_ids,
                params,
                seed=(seed + index * _SEED_STEP) % 2**64,
                stop_ids=stop_ids,
                priority=priority,
                deadline_s=None if timeout_s is None else now + timeout_s,
                on_token=text.push,
                grammar=self._grammars.matcher(params.guided) if params.guided is not None else None,
                bad_words=bad_words,
                speculates=self._core.drafting,
                table=Table(b"", owner=owner),
                arrived_s=now,
            )
            sequence.table.root = self._root(sequence)
            sequences.append(sequence)
            texts.append(text)
        sequences[0].siblings = tuple(sequences[1:])
        return _Live(params, tuple(sequences), tuple(texts), [0] * len(sequences), len(sequences), on_delta=on_delta)

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """Return the token sequences of a word: at the start of a text, and after a space."""
        found = [tuple(self._tokenizer.encode(prefix + word.lstrip())) for prefix in ("", " ")]
        return list(dict.fromkeys(ids for ids in found if ids))

    # --- steps and turns ------------------------------------------------------------------------------------

    def _enter(self, live: _Live) -> None:
        self._num_entering -= len(live.sequences)
        for sequence in live.sequences:
            self._live[sequence.request_id] = live
        self._scheduler.add(live.sequences[0])

    def _end(self, live: _Live) -> None:
        for sequence in live.sequences:
            self._scheduler.abort(sequence)
            self._live.pop(sequence.request_id, None)

    def _drop(self, lives: list[_Live]) -> None:
        """End requests; those that are done are merely forgotten."""
        with self._turn:
            for live in lives:
                self._inbox.append(lambda live=live: self._end(live))
            if not self._stepping:
                self._empty_inbox()
            self._turn.notify_all()

    def _empty_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _advance(self, done: Callable[[], bool]) -> None:
        """Run steps, or wait while another thread runs them, until `done`."""
        with self._turn:
            while not done():
                if self._closed:
                    raise EngineError("this LLM was closed while requests were on their way")
                if self._stepping:
                    self._turn.wait()
                else:
                    self._step()

    def _step(self) -> None:
        """Run one iteration, with the turn held at begin and end, and hand what is new to its requests."""
        self._empty_inbox()
        if not self._scheduler.has_work:
            return
        self._stepping = True
        touched: list[_Sequence] = []
        self._turn.release()
        try:
            touched = self._core.step()
        except BaseException:
            touched = [s for live in set(self._live.values()) for s in live.sequences if s.state == "finished"]
            raise
        finally:
            self._turn.acquire()
            self._stepping = False
            for sequence in touched:
                self._deliver(sequence)
            self._empty_inbox()
            self._turn.notify_all()

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Run steps while there is work, and wait for it, until `stopped` or closed: for a thread of its own."""
        with self._turn:
            while not stopped() and not self._closed:
                if self._stepping or not (self._inbox or self._scheduler.has_work):
                    self._turn.wait()
                    continue
                try:
                    self._step()
                except Exception as error:  # a bug of ours: whoever waits must learn of it
                    self._end_all("error", f"{type(error).__name__}: {error}")

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        for live in set(self._live.values()):
            for sequence in live.sequences:
                self._scheduler.abort(sequence, reason, error)
                self._deliver(sequence)
        self._live.clear()
        self._turn.notify_all()

    def _exclusive(self) -> _Exclusive:
        """Return a context in which no step runs and none begins."""
        return _Exclusive(self)

    def _deliver(self, sequence: _Sequence) -> None:
        """Make the delta of what a sequence gained."""
        live = self._live.get(sequence.request_id)
        if live is None:
            return
        index = live.sequences.index(sequence)
        start = live.num_emitted[index]
        if start < 0:  # ended before
            return
        finished = sequence.finish_reason is not None
        new = tuple(sequence.output_ids[start:])
        live.num_emitted[index] = -1 if finished else start + len(new)
        if finished:
            live.num_unfinished -= 1
        text = live.texts[index].take(final=finished)
        if live.num_unfinished == 0:
            live.output = _output(live)
        delta = Delta(text, new, live.output, index, sequence.finish_reason, tuple(sequence.logprobs[start:]))
        if live.on_delta is not None:
            live.on_delta(delta)
        else:
            live.unread.append(delta)

    def _stream(
        self, prompt_ids: tuple[int, ...], params: SamplingParams, priority: int, timeout_s: float | None
    ) -> Iterator[Delta]:
        (live,) = self._start([(prompt_ids, params)], priority, timeout_s)
        try:
            while live.unread or live.output is None:
                self._advance(lambda: bool(live.unread))
                while live.unread:
                    delta = live.unread.popleft()
                    raise_if_failed(delta)
                    yield delta
        finally:
            self._drop([live])

    def _count(self, step: StepMetrics) -> None:
        self._totals += (1, step.seconds, step.num_prefill_tokens, step.num_decode_tokens, step.num_sampled)
        if self._on_step is not None:
            self._on_step(step)


class _Exclusive:
    """Holds the turn while no step runs."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def __enter__(self) -> None:
        turn = self._llm._turn
        turn.acquire()
        while self._llm._stepping:
            turn.wait()
        self._llm._empty_inbox()

    def __exit__(self, *_: object) -> None:
        self._llm._turn.notify_all()
        self._llm._turn.release()


def raise_if_failed(delta: Delta) -> None:
    """Raise what ended a stream in place of its last delta.

    Raises:
        GenerationError: the engine failed on it.
    """
    if delta.output is not None:
        for completion in delta.output.outputs:
            if completion.finish_reason == "error":
                raise GenerationError(completion.error or "the request failed", [delta.output])


def _output(live: _Live) -> RequestOutput:
    """Return the result of a request whose sequences have all ended."""
    params, first = live.params, live.sequences[0]
    completions = [_completion(live, index) for index in range(len(live.sequences))]
    if params.best_of is not None:
        completions.sort(key=lambda c: -(c.cumulative_logprob or 0.0) / max(len(c.token_ids), 1))
        completions = completions[: params.n]
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
        first.prompt_ids,
        tuple(completions),
        metrics,
        Usage(len(first.prompt_ids), generated),
        tuple(first.prompt_logprobs or [None]) if params.prompt_logprobs is not None else None,
    )


def _completion(live: _Live, index: int) -> CompletionOutput:
    sequence, params = live.sequences[index], live.params
    assert sequence.finish_reason is not None
    counted = params.logprobs is not None or params.best_of is not None
    return CompletionOutput(
        live.texts[index].text,
        tuple(sequence.output_ids),
        sequence.finish_reason,
        index,
        sequence.cumulative_logprob if counted else None,
        tuple(sequence.logprobs) if params.logprobs is not None else None,
        {name: _joined(pieces, sequence.num_tokens - 1) for name, pieces in sequence.taps.items()},
        sequence.error,
    )


def _joined(pieces: list[tuple[int, np.ndarray]], num_positions: int) -> np.ndarray:
    """Join what steps gave at their positions; a later step replaces what an earlier one drafted."""
    out = np.full((num_positions, pieces[0][1].shape[1]), -1, pieces[0][1].dtype)
    for start, rows in pieces:
        out[start : start + len(rows)] = rows[: max(num_positions - start, 0)]
    return out


def _is_integer(value: object) -> bool:
    """Whether `value` is a Python or NumPy integer; a boolean or 1.0 is none."""
    return not isinstance(value, bool) and isinstance(value, SupportsIndex) and getattr(value, "ndim", 0) == 0


def _token_id(value: object) -> int:
    if not _is_integer(value):
        raise RequestError(f"prompt token {value!r} is no token id; pass text, or a list of whole numbers")
    return operator.index(value)  # pyright: ignore[reportArgumentType]


def _limit(name: str, asked: int | None, engine_limit: int) -> int:
    if asked is None:
        return engine_limit
    if not 1 <= asked <= engine_limit:
        raise EngineError(f"{name} is {asked}, this engine allows 1 to {engine_limit}; build it with a higher limit")
    return asked


def _drafts(manifest: Manifest, asked: int) -> int:
    if not 0 <= asked <= MAX_DRAFTS:
        raise EngineError(f"num_speculative_tokens is {asked}, expected 0 to {MAX_DRAFTS}")
    if asked and "mtp" not in manifest.graphs:
        raise EngineError(
            "num_speculative_tokens needs an engine with an MTP graph, this one has none; "
            "export a checkpoint that has the MTP layer, or leave it at 0"
        )
    return asked


def _num_blocks(
    manifest: Manifest, batch: int, max_model_len: int, num_blocks: int | None, kv_cache_memory: int | None
) -> int:
    """Decide the size of the cache in blocks."""
    size = manifest.cache.bytes_per_block
    if num_blocks is not None and kv_cache_memory is not None:
        raise EngineError("num_blocks and kv_cache_memory both give the size of the cache; pass one")
    if num_blocks is not None:
        chosen, asked = num_blocks, f"num_blocks is {num_blocks}"
    elif kv_cache_memory is not None:
        chosen, asked = kv_cache_memory // size, f"kv_cache_memory is {kv_cache_memory:,} bytes"
    else:
        wanted = batch * blocks_needed(max_model_len, manifest.cache.block_size) + 1
        free = _free_memory()
        chosen = wanted if free is None else min(wanted, int(free * _CACHE_SHARE) // size)
        asked = f"{free or 0:,} bytes of memory are free"
    if chosen < 2:
        raise EngineError(f"{asked}, expected room for at least 2 blocks of {size:,} bytes (one is scrap)")
    return chosen


def _free_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
