"""The public interface: `LLM(engine).generate(prompts, SamplingParams(...))`.

Nothing is added to a prompt: text is encoded as it is, special tokens written in it become their ids, and the
begin-of-sequence token is there only if the text holds it.

Any thread may call: how they share the engine is in `turns`, what becomes of a prompt in `intake`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import numpy as np

from seekforge.common.errors import EngineError, RequestError
from seekforge.formats.engine.manifest import Manifest
from seekforge.runtime.backends.base import GraphMetrics, OnLoad
from seekforge.runtime.backends.deterministic import DeterministicBackend
from seekforge.runtime.chat.messages import Message, is_conversation
from seekforge.runtime.chat.request import ChatOptions, ChatProcessor, ChatRequest
from seekforge.runtime.compatibility import check_complete
from seekforge.runtime.engine.cache_size import decide_num_blocks, free_memory
from seekforge.runtime.engine.chat_output import AnswerReader, with_messages
from seekforge.runtime.engine.core import Core, StepMetrics
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.engine.input_processor import (
    Accepted,
    InputProcessor,
    Prompt,
    read_priority,
    read_timeout,
    split_prompts,
)
from seekforge.runtime.engine.kv_cache import BlockPool, KvCache
from seekforge.runtime.engine.llm_options import check_place, options_checked
from seekforge.runtime.engine.outputs import Delta, GenerationError, RequestOutput
from seekforge.runtime.engine.request import RequestState, raise_if_failed
from seekforge.runtime.engine.scheduler import Scheduler
from seekforge.runtime.engine.self_check import SelfCheckResult, run_self_check
from seekforge.runtime.engine.speculative import MAX_DRAFTS, SpeculationMetrics, SpeculationSwitch, Speculator
from seekforge.runtime.engine.step_loop import StepLoop
from seekforge.runtime.sampling.params import TAPS, SamplingParams
from seekforge.runtime.text.tokenizer import Tokenizer
from seekforge.runtime.values import integer, is_integer, listed, shown

#: Messages, or mappings with the keys of the OpenAI interface.
Conversation = Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True)
class LLMMetrics:
    """Counters since the start.

    Attributes:
        num_steps, step_s: iterations and their time.
        num_prefill_tokens, num_decode_tokens: computed.
        num_sampled: tokens generated.
        num_queried_tokens, num_hit_tokens: known tokens of admitted requests, and those found in the prefix cache.
        num_preemptions: requests that lost their blocks.
        drafts_proposed, drafts_accepted: numbers of drafts, by position of the draft; empty without speculation.
        num_running, num_waiting, num_free_blocks: now.
        graphs: CUDA graphs that were captured, launched, and that could not be captured; zeros on a CPU.
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
    graphs: GraphMetrics


class LLMOptions(TypedDict, total=False):
    """Keywords of `LLM` that `AsyncLLM` takes as they are; documented there."""

    max_model_len: int | None
    max_batch_size: int | None
    max_num_batched_tokens: int | None
    num_blocks: int | None
    kv_cache_memory: int | None
    num_speculative_tokens: int
    speculation_off_switch: bool
    prefix_caching: bool
    deterministic: bool
    threads: int | None
    checkpoint: Path | str | None
    self_check: bool
    on_step: Callable[[StepMetrics], None] | None
    before_load: Callable[[LLM], None] | None
    on_load: OnLoad | None


class LLM:
    """A loaded engine that answers requests, from any thread. Close it, or use it as a context manager.

    Attributes:
        engine: the engine folder.
        max_model_len: most tokens of one request, prompt and generated.
        max_batch_size: most completions that run at the same time; more wait.
        num_blocks: cache blocks, the scrap block included.
        num_speculative_tokens: drafts per step; 0 is no speculation.
        self_check: the result of the self-check; None when it was switched off or the engine stores none.
        default_sampling_params: what the checkpoint recommends.

    Example:
        >>> with LLM("engine/", num_speculative_tokens=3) as llm:
        ...     (output,) = llm.generate("Once upon a time", SamplingParams(max_tokens=64, stop=["The end"]))
        ...     print(output.outputs[0].text, output.outputs[0].finish_reason)
    """

    @options_checked
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
        on_load: OnLoad | None = None,
        before_load: Callable[[LLM], None] | None = None,
    ) -> None:
        """Load an engine.

        Args:
            engine: an opened engine or its folder.
            max_model_len: at most the engine's limit. None: that limit, or what the cache holds if less.
            max_batch_size: at most the engine's limit, which None takes.
            max_num_batched_tokens: tokens of one step; longer prompts are run in chunks. As above.
            num_blocks: size of the cache in blocks of 64 tokens, the scrap block included.
            kv_cache_memory: size of the cache in bytes, instead of `num_blocks`. With neither, the cache
                holds `max_batch_size` requests of `max_model_len`, or as many as fit (`cache_size`).
            num_speculative_tokens: tokens to draft with the MTP module, 0 to 5. What a draft stands for is still chosen
                by the model; a step of several tokens may round otherwise than a step of one (docs/runtime.md).
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
            on_step: called with the metrics of each iteration, by the thread that ran it.
            on_load: called while weights are read from a checkpoint.
            before_load: called when all but the weights is there: `check`, `chat_request` and `default_sampling_params`
                work, so that what cannot be served is refused before hundreds of gigabytes are read.

        Raises:
            RequestError: an argument has the wrong type.
            EngineError: the engine is damaged, fails its self-check, or cannot do what is asked.
            EnvironmentFault: a library that it needs is not installed.
        """
        if not isinstance(engine, Engine):
            check_place("engine", engine)
        self.engine = engine if isinstance(engine, Engine) else Engine.open(engine)
        manifest = self.engine.manifest
        check_complete(self.engine.folder, manifest)
        limits = manifest.limits
        self.max_batch_size = _limit("max_batch_size", max_batch_size, limits.max_batch_size)
        tokens = _limit("max_num_batched_tokens", max_num_batched_tokens, limits.max_num_batched_tokens)
        self.max_batch_size = min(self.max_batch_size, tokens)
        most = manifest.config.get("max_position_embeddings")
        longest = _limit("max_model_len", max_model_len, limits.max_model_len, most if is_integer(most) else None)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}, expected at least 1")
        self.num_speculative_tokens = _drafts(manifest, num_speculative_tokens)
        self.num_blocks = decide_num_blocks(
            manifest,
            max_batch_size=self.max_batch_size,
            max_model_len=longest,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            free_bytes=free_memory(),
        )
        block_size = manifest.cache.block_size
        holds = (self.num_blocks - 1) * block_size
        if max_model_len is not None and holds < max_model_len:
            raise EngineError(
                f"max_model_len {max_model_len} needs {self.engine.cache_bytes(max_model_len):,} bytes of cache, "
                f"the cache has {self.num_blocks * manifest.cache.bytes_per_block:,}; lower max_model_len or give more "
                "memory (num_blocks or kv_cache_memory)"
            )
        self.max_model_len = min(longest, holds)
        self.default_sampling_params = _default_params(manifest)
        self._scheduler = Scheduler(
            KvCache(BlockPool(self.num_blocks), block_size, lookahead=int(self.num_speculative_tokens > 0)),
            max_batch_size=self.max_batch_size,
            max_num_batched_tokens=tokens,
            max_model_len=self.max_model_len,
            max_waiting=max_waiting,
            most_model_len=limits.max_model_len,
        )
        outputs = [spec.name for spec in manifest.graphs["model"].outputs if spec.role == "tap"]
        tap_names = {kind: tuple(n for n in outputs if n.partition(".")[0] == kind) for kind in TAPS}
        self._chat = ChatProcessor(manifest.config.get("model_type"), self.engine.tokenizer)
        self._intake = InputProcessor(
            self.engine,
            self._scheduler,
            tap_names=tap_names,
            drafting=lambda: self._core.drafting,
            prefix_caching=prefix_caching,
        )
        if before_load is not None:
            before_load(self)
        place = None if checkpoint is None else Path(checkpoint)
        backend = self.engine.open_backend(threads=threads, checkpoint=place, progress=on_load)
        if deterministic:
            if manifest.target.backend != "onnxruntime":
                raise EngineError(
                    f"deterministic works on onnxruntime, this engine runs on {manifest.target.backend}; leave it out"
                )
            backend = DeterministicBackend(backend)
        self.self_check: SelfCheckResult | None = None
        if self_check and manifest.self_check is not None:
            self.self_check = run_self_check(backend, manifest.self_check)
        try:
            backend.allocate_caches(self.num_blocks)
        except MemoryError:
            size = self.num_blocks * manifest.cache.bytes_per_block
            raise EngineError(f"the cache needs {size:,} bytes, which are not free; lower num_blocks") from None
        speculator = None
        if self.num_speculative_tokens:
            speculator = Speculator(backend, self.num_speculative_tokens, block_size, manifest.vocab_size)
        self._core = Core(
            backend,
            self._scheduler,
            manifest.vocab_size,
            tap_names=tap_names,
            speculator=speculator,
            switch=SpeculationSwitch() if speculation_off_switch and speculator is not None else None,
        )
        self._core.on_step = self._count
        self._on_step = on_step
        self._totals = np.zeros(5)
        self._turns = StepLoop(self._core)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = 0,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answer `prompts` together, in as few steps as the engine's limits allow.

        Args:
            prompts: each is text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; one alone
                may be given bare.
            sampling_params: one for all of them, or one each; None takes `default_sampling_params`.
            priority: lower is served sooner.
            timeout_s: after this time a request ends with what it has, finish_reason "timeout"; None sets no bound.

        Returns:
            One output per prompt, in their order.

        Raises:
            RequestError: a prompt cannot be served. All are checked before any work is done.
            GenerationError: the engine failed on some; it holds the outputs of all.
        """
        batch, single = split_prompts(prompts)
        each = self._params_for(len(batch), sampling_params, self.default_sampling_params)
        priorities = self._priorities(len(batch), priority)
        timeout = read_timeout(timeout_s)
        accepted: list[Accepted] = []
        for index, (prompt, params) in enumerate(zip(batch, each, strict=True)):
            try:
                accepted.append(self._intake.check(prompt, params))
            except RequestError as error:
                raise (error if single else RequestError(f"prompt {index}: {error}")) from None
        lives = self._start(accepted, priorities, timeout)
        try:
            self._turns.advance(lambda: all(live.output is not None for live in lives))
        finally:
            self._turns.drop(lives)
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
            priority, timeout_s: the arguments of `generate`.

        Returns:
            Deltas; the last one has `output`. With n > 1, those of the completions are mixed.

        Raises:
            RequestError: the prompt cannot be served; raised here, not at the first delta.
            GenerationError: the engine failed; raised in place of the last delta.
        """
        request = self.accept(prompt, sampling_params, priority=priority, timeout_s=timeout_s)
        refuse_best_of(request[0].params)
        self._scheduler.check_queue(request[0].params.num_sequences)
        return self._stream(*request)

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
        if not isinstance(requests, Iterable):
            raise RequestError(f"requests is {shown(requests)}, expected pairs of a prompt and SamplingParams")
        most = 4 * self.max_batch_size if ahead is None else integer("ahead", ahead, 1)
        source = enumerate(requests)
        lives: dict[int, RequestState] = {}
        try:
            while True:
                while len(lives) < most and (entry := next(source, None)) is not None:
                    number, request = entry
                    if not isinstance(request, (tuple, list)) or len(request) != 2:
                        raise RequestError(f"request {number} is {shown(request)}, expected (prompt, sampling_params)")
                    prompt, params = request
                    accepted, priority, timeout = self.accept(prompt, params)
                    (lives[number],) = self._start([accepted], [priority], timeout)
                if not lives:
                    return
                self._turns.advance(lambda: any(live.output is not None for live in lives.values()))
                ended = [number for number, live in lives.items() if live.output is not None]
                for number in ended:
                    live = lives.pop(number)
                    self._turns.drop([live])
                    assert live.output is not None
                    yield number, live.output
        finally:
            self._turns.drop(list(lives.values()))

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
        each = self._params_for(len(batch), sampling_params, self._chat_params)
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
        return _answers(request, self.stream(request.prompt, request.params, priority=priority, timeout_s=timeout_s))

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

    @property
    def weight_version(self) -> int:
        """How often weights were updated since the engine was opened: 0 are its own."""
        return self._intake.weight_version

    def update_weights(self, tensors: Mapping[str, np.ndarray], *, max_staleness: int | None = None) -> int:
        """Swap weights between two steps; the engine is not built again. What is cached is dropped.

        Requests on their way go on with the new weights; their tokens so far are computed anew.

        Args:
            tensors: checkpoint tensor name -> new value, in the checkpoint's shape and dtype. A weight that is
                computed from several tensors (all experts of a layer; a weight and its scales) needs all of them.
            max_staleness: completions on their way whose first token was chosen more than so many updates ago, this
                one counted, end with what they have, finish_reason "abort"; None lets them go on.

        Returns:
            The version of the new weights (`weight_version`), which what is chosen from now on bears.

        Raises:
            EngineError: a name, shape or dtype is wrong, a tensor that belongs to them is missing, or the backend
                cannot do this; nothing is changed.
        """
        if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
            raise EngineError(f"update_weights: tensors is {shown(tensors)}, expected a mapping of names to arrays")
        for name, value in tensors.items():
            if not isinstance(value, np.ndarray):
                raise EngineError(f"update_weights: {name} is {shown(value)}, expected a NumPy array")
        most = None if max_staleness is None else integer("max_staleness", max_staleness, 0)
        with self._turns.between_steps():
            self._core.backend.update_weights(tensors)
            self._intake.weight_version += 1
            self._scheduler.restart(self._intake.root, self.weight_version)
            if most is not None:
                self._turns.end_stale(self.weight_version - most)
            return self.weight_version

    def reset_prefix_cache(self) -> None:
        """Forget what prompts have in common: what comes is computed anew. Requests on their way keep their blocks."""
        with self._turns.between_steps():
            self._scheduler.cache.pool.forget_all()

    def pause(self) -> None:
        """Begin no further step. The one that runs ends first; requests enter and wait, and none times out."""
        self._turns.pause(True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._turns.pause(False)

    @property
    def paused(self) -> bool:
        """Whether no step begins."""
        return self._turns.paused

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Refuse a request that cannot be served, and do nothing else.

        Raises:
            RequestError: it cannot.
        """
        self.accept(prompt, params)

    def accept(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        priority: int | None = 0,
        timeout_s: float | None = None,
        in_reasoning: bool = False,
    ) -> tuple[Accepted, int, float | None]:
        """Return a request with its priority and its timeout, all checked: whatever came, only this call fails.

        Token ids that end inside a thought are passed with `in_reasoning`: a form begins behind the thought.

        Raises:
            RequestError: it cannot be served.
        """
        chosen = self.default_sampling_params if params is None else params
        return (
            self._intake.check(prompt, chosen, in_reasoning=in_reasoning),
            read_priority(priority),
            read_timeout(timeout_s),
        )

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model: `encode`, `decode`, `vocab_size`."""
        return self.engine.tokenizer

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
            self._core.backend.graph_metrics(),
        )

    def close(self) -> None:
        """Give back the engine's memory. Requests on their way are ended."""
        if self._turns.closed:
            return
        with self._turns.between_steps():
            self._turns.closed = True
            self._turns.end_all("abort", None)
            self._core.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _params_for(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams
    ) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [default if params is None else params] * count
        if not isinstance(params, (list, tuple)):
            raise RequestError(f"sampling_params is {shown(params)}, expected SamplingParams, or one for each prompt")
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling_params for {count} prompts; pass one, or one each")
        return [default if one is None else one for one in params]

    def _priorities(self, count: int, priority: int | Sequence[int] | None) -> Sequence[int]:
        many = None if isinstance(priority, Set) else listed(priority)  # a set has no order
        if many is None:
            return [read_priority(priority)] * count
        if len(many) != count:
            raise RequestError(f"{len(many)} priorities for {count} prompts; pass one, or one each")
        return [read_priority(one) for one in many]

    def _start(
        self,
        requests: Sequence[Accepted],
        priorities: Sequence[int],
        timeout_s: float | None,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[RequestState]:
        """Put requests that were checked into the queue, all or none; they are dropped by whoever started them."""
        return self._turns.enter(
            sum(request.params.num_sequences for request in requests),
            lambda: [
                self._intake.make(request, priority, timeout_s, on_delta)
                for request, priority in zip(requests, priorities, strict=True)
            ],
        )

    def _stream(self, request: Accepted, priority: int, timeout_s: float | None) -> Iterator[Delta]:
        (live,) = self._start([request], [priority], timeout_s)
        try:
            while live.unread or live.output is None:
                self._turns.advance(lambda: bool(live.unread))
                while live.unread:
                    delta = live.unread.popleft()
                    raise_if_failed(delta)
                    yield delta
        finally:
            self._turns.drop([live])

    def _count(self, step: StepMetrics) -> None:
        self._totals += (1, step.seconds, step.num_prefill_tokens, step.num_decode_tokens, step.num_sampled)
        if self._on_step is not None:
            self._on_step(step)


def _answers(request: ChatRequest, deltas: Iterator[Delta]) -> Generator[Delta, None, None]:
    """Yield deltas with what the answer gained; closing this ends the request."""
    reader = AnswerReader(request)
    try:
        for delta in deltas:
            yield reader.delta(delta)
    finally:
        if isinstance(deltas, Generator):
            deltas.close()


def refuse_best_of(params: SamplingParams) -> None:
    """Refuse what cannot be streamed.

    Raises:
        RequestError: which completions are returned is known at the end only.
    """
    if params.best_of not in (None, params.n):
        raise RequestError("best_of cannot be streamed, since the best are known at the end only; use generate")


def _limit(name: str, requested: int | None, engine_limit: int, most: int | None = None) -> int:
    """Return what is asked for, else the engine's limit; `most` is what an engine could be built with."""
    if requested is None:
        return engine_limit
    if not 1 <= requested <= engine_limit:
        could = requested > engine_limit and (most is None or most > engine_limit)
        higher = "" if most is None else f", {most} at most"
        raise EngineError(
            f"{name} is {requested}, this engine allows 1 to {engine_limit}"
            + (f"; build it with a higher limit{higher}" if could else "; choose one of these")
        )
    return requested


def _default_params(manifest: Manifest) -> SamplingParams:
    """Return what the checkpoint recommends; the ends of sequence are looked at as well."""
    for token in manifest.eos_token_ids or (-1,):
        if not 0 <= token < manifest.vocab_size:
            raise EngineError(
                f"manifest.json, key 'eos_token_id': {shown(manifest.eos_token_id)}, expected a token id from 0 to "
                f"{manifest.vocab_size - 1}, or some; build the engine again"
            )
    recommended: dict[str, Any] = {**manifest.generation}
    if float(recommended.get("top_k", 0)).is_integer():
        recommended["top_k"] = int(recommended.get("top_k", 0))
    try:
        return SamplingParams(**recommended)
    except RequestError as error:
        raise EngineError(f"manifest.json, key 'generation': {error}; build the engine again") from None


def _drafts(manifest: Manifest, requested: int) -> int:
    if not 0 <= requested <= MAX_DRAFTS:
        raise EngineError(f"num_speculative_tokens is {requested}, expected 0 to {MAX_DRAFTS}")
    if requested and "mtp" not in manifest.graphs:
        raise EngineError(
            "num_speculative_tokens needs an engine with an MTP graph, this one has none; "
            "export a checkpoint that has the MTP layer, or leave it at 0"
        )
    return requested
