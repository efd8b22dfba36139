"""What is done with a loaded engine between its steps: other weights, pauses, counters, its end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime.engine.block_changes import BlockChanges
from seekforge.runtime.engine.core import Core
from seekforge.runtime.engine.input_processor import InputProcessor
from seekforge.runtime.engine.scheduler import Scheduler
from seekforge.runtime.engine.step_loop import StepLoop
from seekforge.runtime.llm_metrics import LLMMetrics, StepTotals
from seekforge.runtime.values import integer, shown


class EngineControl:
    """What controls an engine whose steps a loop takes."""

    num_speculative_tokens: int
    _core: Core
    _intake: InputProcessor
    _scheduler: Scheduler
    _steps: StepTotals
    _turns: StepLoop

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
                raise EngineError(f"update_weights: {shown(name)} is {shown(value)}, expected a NumPy array")
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

    def follow_blocks(self) -> BlockChanges:
        """Return what notes from now on which beginnings of prompts are in the cache, for a router of several engines.

        What it notes is to be taken between steps, such as when `after_deltas` of the step loop is called.
        """
        with self._turns.between_steps():
            return self._scheduler.cache.follow()

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

    def metrics(self) -> LLMMetrics:
        """Return the counters."""
        return self._steps.metrics(self._core)

    @property
    def drafting(self) -> bool:
        """Whether requests that start now are drafted for; may be set where `num_speculative_tokens` is not 0."""
        return self._core.drafting

    @drafting.setter
    def drafting(self, value: bool) -> None:
        if value and not self.num_speculative_tokens:
            raise RequestError("drafting needs an LLM with num_speculative_tokens of at least 1")
        self._core.may_draft = value

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
