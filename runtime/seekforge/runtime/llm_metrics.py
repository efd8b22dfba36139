"""What an engine has done since its start, as counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from seekforge.runtime.backends.base import GraphMetrics
from seekforge.runtime.engine.core import Core, StepMetrics
from seekforge.runtime.engine.speculative import SpeculationMetrics


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


class StepTotals:
    """Adds up what the iterations of an engine did."""

    def __init__(self, on_step: Callable[[StepMetrics], None] | None) -> None:
        """Begin at zero; `on_step` is told of each iteration as well."""
        self._on_step = on_step
        self._num_steps = self._num_prefill_tokens = self._num_decode_tokens = self._num_sampled = 0
        self._step_s = 0.0

    def add(self, step: StepMetrics) -> None:
        """Count one iteration."""
        self._num_steps += 1
        self._step_s += step.seconds
        self._num_prefill_tokens += step.num_prefill_tokens
        self._num_decode_tokens += step.num_decode_tokens
        self._num_sampled += step.num_sampled
        if self._on_step is not None:
            self._on_step(step)

    def metrics(self, core: Core) -> LLMMetrics:
        """Return the totals with what `core` and its scheduler count."""
        drafts = core.speculator.metrics if core.speculator else SpeculationMetrics([], [])
        cache = core.scheduler.cache
        return LLMMetrics(
            self._num_steps,
            self._step_s,
            self._num_prefill_tokens,
            self._num_decode_tokens,
            self._num_sampled,
            cache.num_queried_tokens,
            cache.num_hit_tokens,
            core.scheduler.num_preemptions,
            tuple(drafts.proposed),
            tuple(drafts.accepted),
            core.scheduler.num_running,
            core.scheduler.num_waiting,
            cache.pool.num_free,
            core.backend.graph_metrics(),
        )
