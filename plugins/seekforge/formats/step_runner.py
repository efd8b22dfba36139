"""The one loop that takes steps: over whatever runs them, for dumps, checks and tests. NumPy only.

A `StepRunner` holds caches and runs one step of one graph: the PyTorch model, the graphs of a CPU engine in ONNX
Runtime, and every backend of the runtime. `run_steps` gives it the steps of a plan in order, each case with caches of
its own, and feeds the MTP module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from seekforge.formats.parity_steps import Case, ParitySteps, PlanStep, step_inputs
from seekforge.formats.step_io import MODEL, MTP, StepInputs

#: The result that the MTP module is fed, and its name among a step's inputs.
_HIDDEN, _HIDDEN_IN = "hidden", "hidden_in"


class StepOutputs(Protocol):
    """Results of one step, still where they were computed."""

    def fetch(self, name: str) -> np.ndarray:
        """Return the output `name` on the host. Valid until the next step of the same graph; call it before."""
        ...


class StepRunner(Protocol):
    """Something that runs steps over paged caches of its own. Not thread-safe: one caller at a time."""

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks for every graph; earlier ones are given back."""
        ...

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> StepOutputs:
        """Run one step and update the caches.

        Args:
            inputs: the step.
            outputs: names that may be fetched afterwards; others are dropped as early as possible.
            graph: `MODEL` or `MTP`.
        """
        ...


class CacheReader(StepRunner, Protocol):
    """A runner that shows its caches."""

    def cache(self, name: str) -> np.ndarray:
        """Return a copy of one cache, such as `latent_cache.3`: [NB·64, width]."""
        ...


@dataclass(frozen=True)
class StepResults:
    """One step that was run.

    Attributes:
        number: its number over all cases of the plan.
        case: the case that it belongs to.
        step: what it was.
        inputs: the arrays that it was given.
        tensors: the outputs that were asked for, by name, copied to the host.
    """

    number: int
    case: Case
    step: PlanStep
    inputs: StepInputs
    tensors: dict[str, np.ndarray]


def run_steps(
    runner: StepRunner,
    plan: ParitySteps,
    outputs: Callable[[PlanStep], Collection[str]],
    *,
    graphs: Collection[str] = (MODEL, MTP),
    inputs: Callable[[int, PlanStep], Mapping[str, np.ndarray]] = lambda number, step: {},
    on_case: Callable[[Case], object] = lambda case: None,
) -> Iterator[StepResults]:
    """Run every step of a plan in order, and yield each before the next one runs.

    Args:
        runner: what runs them. A case begins with zeroed caches.
        plan: the steps.
        outputs: the names of the outputs wanted of a step.
        graphs: the graphs that there are; steps of another graph are left out.
        inputs: what a step takes from elsewhere, by name: `hidden_states` and `residual` of a part of a model, or
            `hidden_in` [B, Q, H] f32 of an MTP step, which is else fed the `hidden` of the step before it.
        on_case: called when a case begins.
    """
    current: Case | None = None
    hidden: np.ndarray | None = None
    for number, case, step in plan.steps():
        if case is not current:
            on_case(case)
            runner.allocate_caches(case.num_blocks)
            current = case
        if step.graph not in graphs:
            continue
        tensors = dict(inputs(number, step))
        hidden_in = tensors.pop(_HIDDEN_IN, hidden) if step.graph == MTP else None
        arrays = replace(step_inputs(case, step), hidden_in=hidden_in, intermediate_tensors=tensors)
        names = outputs(step)
        results = runner.run(arrays, outputs=names, graph=step.graph)
        fetched = {name: np.array(results.fetch(name)) for name in names}
        if step.graph == MODEL:
            hidden = fetched.get(_HIDDEN)
        yield StepResults(number, case, step, arrays, fetched)
