"""The public face: `LLM(engine).generate(prompts, SamplingParams(...))`.

Nothing is added to a prompt: text is encoded as it is, special tokens written in it become their ids, and the
begin-of-sequence token is there only if the text holds it.
"""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, SupportsIndex

from seekforge.plugins.errors import EngineError, RequestError
from seekforge.plugins.formats.manifest import Manifest
from seekforge.runtime.core import Core
from seekforge.runtime.engine import Engine
from seekforge.runtime.kv_cache import BlockPool, blocks_needed
from seekforge.runtime.sampling import SamplingParams
from seekforge.runtime.scheduler import Scheduler
from seekforge.runtime.self_check import SelfCheckResult, run_self_check
from seekforge.runtime.sequence import FinishReason
from seekforge.runtime.sequence import Sequence as _Sequence
from seekforge.runtime.tokenizer import Detokenizer

#: Part of the free memory that caches take when no size is asked for.
_CACHE_SHARE = 0.5

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class RequestMetrics:
    """What a request cost.

    Attributes:
        prefill_tokens, prefill_s: the prompt, from its first step to its first generated token.
        decode_tokens, decode_s: the generated tokens after the first, to the last.
    """

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        text: of `token_ids`, without special tokens.
        token_ids: all that were generated, the one that ended the request included.
        finish_reason: "stop" (end of sequence or a stop token) or "length" (max_tokens).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. `outputs` has one entry."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics


@dataclass(frozen=True)
class Delta:
    """What a stream gained by one token.

    Attributes:
        text: may be empty: a character can need several tokens. Joined, the texts are the whole text.
        token_ids: the new tokens.
        output: the whole request, in the last delta only.
    """

    text: str
    token_ids: tuple[int, ...]
    output: RequestOutput | None = None


@dataclass
class _Live:
    """A request on its way: its sequence, and deltas that nobody has read yet."""

    sequence: _Sequence
    detokenizer: Detokenizer
    text: list[str] = field(default_factory=list)
    unread: list[Delta] = field(default_factory=list)
    output: RequestOutput | None = None


class LLM:
    """A loaded engine that answers requests. Use from one thread; close it, or use it as a context manager.

    Attributes:
        engine: the engine folder.
        max_model_len: most tokens of one request, prompt and generated.
        max_batch_size: most requests that run at the same time; more wait.
        num_blocks: cache blocks, the scrap block included.
        self_check: its result; None when it was switched off or the engine stores none.
        default_sampling_params: what the checkpoint recommends.
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
        threads: int | None = None,
        self_check: bool = True,
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
            threads: CPU threads for one operator; None takes the cores this process may use.
            self_check: compare with the results stored in the engine before serving.

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
        backend = self.engine.open_backend(threads=threads)
        self.self_check: SelfCheckResult | None = None
        if self_check and manifest.self_check is not None:
            self.self_check = run_self_check(backend, manifest.self_check, block_size)
        try:
            backend.allocate_caches(self.num_blocks)
        except MemoryError:
            size = self.num_blocks * manifest.cache.bytes_per_block
            raise EngineError(f"the cache needs {size:,} bytes, which are not free; lower num_blocks") from None
        self._scheduler = Scheduler(
            BlockPool(self.num_blocks),
            block_size=block_size,
            max_batch_size=self.max_batch_size,
            max_num_batched_tokens=tokens,
            max_model_len=self.max_model_len,
        )
        self._core = Core(backend, self._scheduler, manifest.vocab_size)
        self._live: dict[int, _Live] = {}
        self._num_requests = 0

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer `prompts` together, in as few steps as the engine's limits allow.

        Args:
            prompts: texts or lists of token ids; one alone may be given bare.
            sampling_params: for all of them; None takes `default_sampling_params`.

        Returns:
            One output per prompt, in their order.

        Raises:
            RequestError: a prompt cannot be served. All are checked before any work is done.
        """
        params = sampling_params or self.default_sampling_params
        single = isinstance(prompts, str) or (len(prompts) > 0 and _is_integer(prompts[0]))
        batch: Sequence[Prompt] = [prompts] if single else prompts  # pyright: ignore[reportAssignmentType]
        encoded: list[tuple[int, ...]] = []
        for index, prompt in enumerate(batch):
            try:
                encoded.append(self._check(prompt, params))
            except RequestError as error:
                raise (error if len(batch) == 1 else RequestError(f"prompt {index}: {error}")) from None
        lives = [self._start(ids, params) for ids in encoded]
        try:
            while any(live.output is None for live in lives):
                self._step()
                for live in lives:
                    live.unread.clear()
        finally:
            self._drop(lives)
        return [live.output for live in lives if live.output is not None]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer one prompt token by token. Closing the iterator early ends the request.

        Several streams may be read by turns, and `generate` called between: they share the engine's steps.

        Args:
            prompt: text or token ids.
            sampling_params: None takes `default_sampling_params`.

        Returns:
            Deltas; the last one has `output`.

        Raises:
            RequestError: the prompt cannot be served; raised here, not at the first delta.
        """
        params = sampling_params or self.default_sampling_params
        return self._stream(self._check(prompt, params), params)

    def _stream(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Iterator[Delta]:
        live = self._start(prompt_ids, params)
        try:
            while live.unread or live.output is None:
                if not live.unread:
                    self._step()
                deltas, live.unread = live.unread, []
                yield from deltas
        finally:
            self._drop([live])

    def close(self) -> None:
        """Give back the engine's memory. Requests on their way are ended."""
        self._drop(list(self._live.values()))
        self._core.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """Encode one prompt and refuse it if it cannot be served."""
        vocab_size = self.engine.manifest.vocab_size
        ids = tuple(self._tokenizer.encode(prompt) if isinstance(prompt, str) else map(_token_id, prompt))
        for name, tokens in (("prompt token", ids), ("stop_token_ids entry", params.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name} {token} is out of range, expected 0 to {vocab_size - 1}")
        self._scheduler.check_request(len(ids), params.max_tokens)
        return ids

    def _start(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> _Live:
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= {self.engine.manifest.eos_token_id}
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self._num_requests += 1
        sequence = _Sequence(self._num_requests, prompt_ids, params, seed, stop_ids)
        live = _Live(sequence, Detokenizer(self._tokenizer))
        self._scheduler.add(sequence)
        self._live[sequence.request_id] = live
        return live

    def _step(self) -> None:
        """Run one iteration and hand each new token to its request."""
        for sequence in self._core.step():
            live = self._live[sequence.request_id]
            token = sequence.output_ids[-1]
            text = live.detokenizer.push(token)
            if sequence.finish_reason is not None:
                text += live.detokenizer.finish()
            live.text.append(text)
            if sequence.finish_reason is not None:
                live.output = _output(live)
            live.unread.append(Delta(text, (token,), live.output))

    def _drop(self, lives: list[_Live]) -> None:
        for live in lives:
            self._scheduler.abort(live.sequence)
            self._live.pop(live.sequence.request_id, None)


def _output(live: _Live) -> RequestOutput:
    sequence = live.sequence
    assert sequence.finish_reason is not None
    started, first, last = sequence.started_s, sequence.first_token_s, sequence.last_token_s
    assert started is not None and first is not None and last is not None
    metrics = RequestMetrics(
        prefill_tokens=len(sequence.prompt_ids),
        prefill_s=first - started,
        decode_tokens=len(sequence.output_ids) - 1,
        decode_s=last - first,
    )
    completion = CompletionOutput("".join(live.text), tuple(sequence.output_ids), sequence.finish_reason)
    return RequestOutput(sequence.prompt_ids, (completion,), metrics)


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
