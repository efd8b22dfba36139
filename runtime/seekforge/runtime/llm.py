"""The public interface: `LLM(engine).generate(prompts, SamplingParams(...))`.

Nothing is added to a prompt: text is encoded as it is, special tokens written in it become their ids, and the
begin-of-sequence token is there only if the text holds it.

Any thread may call: how they share the engine is in `engine/step_loop.py`, what becomes of a prompt in
`engine/input_processor.py`. What a conversation becomes is in `llm_chat.py`, what is done between steps in
`llm_control.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime.arguments import (
    Prompt,
    read_params,
    read_priorities,
    read_priority,
    read_timeout,
    refuse_best_of,
    split_prompts,
)
from seekforge.runtime.backends.base import OnLoad
from seekforge.runtime.backends.deterministic import DeterministicBackend
from seekforge.runtime.chat.request import ChatProcessor
from seekforge.runtime.chat.template import checkpoint_template
from seekforge.runtime.compatibility import check_complete
from seekforge.runtime.engine.core import Core, StepMetrics
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.engine.input_processor import Accepted, InputProcessor
from seekforge.runtime.engine.kv_cache import BlockPool, KvCache
from seekforge.runtime.engine.outputs import Delta, GenerationError, RequestOutput
from seekforge.runtime.engine.request import RequestState, raise_if_failed
from seekforge.runtime.engine.scheduler import Scheduler
from seekforge.runtime.engine.self_check import SelfCheckResult, run_self_check
from seekforge.runtime.engine.speculative import SpeculationSwitch, Speculator
from seekforge.runtime.engine.step_loop import StepLoop
from seekforge.runtime.llm_chat import Conversations
from seekforge.runtime.llm_control import EngineControl
from seekforge.runtime.llm_metrics import StepTotals
from seekforge.runtime.llm_options import check_place, checked_drafts, decide_sizes, options_checked, recommended_params
from seekforge.runtime.sampling.params import TAPS, SamplingParams
from seekforge.runtime.text.tokenizer import Tokenizer
from seekforge.runtime.values import integer, shown


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


class LLM(Conversations, EngineControl):
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
        sizes = decide_sizes(
            self.engine,
            max_model_len=max_model_len,
            max_batch_size=max_batch_size,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
        )
        self.max_model_len, self.max_batch_size = sizes.max_model_len, sizes.max_batch_size
        self.num_blocks = sizes.num_blocks
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}, expected at least 1")
        self.num_speculative_tokens = checked_drafts(manifest, num_speculative_tokens)
        self.default_sampling_params = recommended_params(manifest)
        self._scheduler = Scheduler(
            KvCache(
                BlockPool(self.num_blocks), manifest.cache.block_size, lookahead=int(self.num_speculative_tokens > 0)
            ),
            max_batch_size=self.max_batch_size,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_waiting=max_waiting,
            most_model_len=manifest.limits.max_model_len,
        )
        outputs = [spec.name for spec in manifest.graphs["model"].outputs if spec.role == "tap"]
        tap_names = {kind: tuple(n for n in outputs if n.partition(".")[0] == kind) for kind in TAPS}
        self._chat = ChatProcessor(
            manifest.config.get("model_type"), self.engine.tokenizer, checkpoint_template(self.engine.folder)
        )
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
        with contextlib.ExitStack() as opened:
            opened.callback(backend.close)  # of an engine that is refused after all: it may have processes
            if deterministic:
                if manifest.target.backend != "onnxruntime":
                    raise EngineError(
                        f"deterministic works on onnxruntime, this engine runs on {manifest.target.backend}; "
                        "leave it out"
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
                speculator = Speculator(
                    backend, self.num_speculative_tokens, manifest.cache.block_size, manifest.vocab_size
                )
            self._core = Core(
                backend,
                self._scheduler,
                manifest.vocab_size,
                tap_names=tap_names,
                speculator=speculator,
                switch=SpeculationSwitch() if speculation_off_switch and speculator is not None else None,
            )
            self._steps = StepTotals(on_step)
            self._core.on_step = self._steps.add
            self._turns = StepLoop(self._core)
            opened.pop_all()

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
        each = read_params(len(batch), sampling_params, self.default_sampling_params)
        priorities = read_priorities(len(batch), priority)
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
