"""One loop takes steps: each case has caches of its own, and the MTP module is fed by the step before it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from seekforge.formats.parity_steps import ParitySteps, make_plan
from seekforge.formats.step_io import MODEL, MTP, StepInputs
from seekforge.formats.step_runner import StepResults, run_steps


class Outputs:
    """Reads every output from one buffer, which the next step overwrites, as a device does."""

    def __init__(self, buffer: np.ndarray, names: Collection[str]) -> None:
        self.buffer, self.names = buffer, names

    def fetch(self, name: str) -> np.ndarray:
        assert name in self.names
        return self.buffer


class Runner:
    """Gives the number of the run, counted from 1, in every output."""

    def __init__(self) -> None:
        self.buffer = np.zeros(1)
        self.log: list[str | int] = []
        self.inputs: list[StepInputs] = []

    def allocate_caches(self, num_blocks: int) -> None:
        self.log.append(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> Outputs:
        self.log.append(graph)
        self.inputs.append(inputs)
        self.buffer[:] = len(self.inputs)
        return Outputs(self.buffer, outputs)


def plan_of(*modes: str, context: int = 6) -> ParitySteps:
    return make_plan(contexts=(context,), vocab_size=1024, index_topk=64, has_mtp=True, modes=modes)  # pyright: ignore


def run(runner: Runner, plan: ParitySteps, **options: object) -> list[StepResults]:
    return list(run_steps(runner, plan, lambda step: ("hidden", "logits"), **options))  # pyright: ignore


def test_each_case_begins_with_caches_of_its_own() -> None:
    runner, plan = Runner(), plan_of("whole", "decode", "mtp")
    cases: list[str] = []
    results = run(runner, plan, on_case=lambda case: cases.append(case.name))
    expected: list[str | int] = []
    for case in plan.cases:
        expected += [case.num_blocks, *(step.graph for step in case.steps)]
    assert runner.log == expected
    assert cases == [case.name for case in plan.cases]
    assert [one.number for one in results] == list(range(len(results)))


def test_results_outlive_the_step_that_made_them() -> None:
    results = run(Runner(), plan_of("decode"))
    assert [one.tensors["logits"].item() for one in results] == [*range(1, len(results) + 1)]
    assert all(one.tensors.keys() == {"hidden", "logits"} for one in results)


def test_an_mtp_step_is_fed_the_hidden_state_of_the_step_before_it() -> None:
    runner = Runner()
    for number, one in enumerate(run(runner, plan_of("mtp")), 1):
        fed = one.inputs.hidden_in
        assert (fed is not None and fed.item() == number - 1) if one.step.graph == MTP else fed is None


def test_what_comes_from_elsewhere_goes_in_by_name() -> None:
    def inputs(number: int, step: object) -> dict[str, np.ndarray]:
        return {"residual": np.full(1, 10 + number), "hidden_in": np.full(1, 20 + number)}

    for one in run(Runner(), plan_of("mtp"), inputs=inputs):
        assert one.inputs.array("residual").item() == 10 + one.number
        assert one.inputs.hidden_in is None or one.inputs.hidden_in.item() == 20 + one.number


def test_steps_of_a_graph_that_is_not_there_are_left_out() -> None:
    runner, plan = Runner(), plan_of("mtp")
    results = run(runner, plan, graphs=(MODEL,))
    assert [one.number for one in results] == [n for n, _, step in plan.steps() if step.graph == MODEL]
    assert MTP not in runner.log


@pytest.mark.parametrize("modes", [("whole",), ("decode", "mtp"), ("ragged", "mtp")])
def test_last_steps_are_the_last_of_each_graph_in_each_case(modes: tuple[str, ...]) -> None:
    plan, seen = plan_of(*modes), set()
    numbered = list(plan.steps())
    for number, case, step in reversed(numbered):
        assert (number in plan.last_steps()) == ((case.name, step.graph) not in seen)
        seen.add((case.name, step.graph))


def test_places_are_those_of_the_rows_that_are_no_padding() -> None:
    for _, case, step in plan_of("ragged", context=70).steps():
        assert len(step.places()) == sum(len(new) for new in step.tokens)
        assert all(0 <= position < case.context for _, position in step.places())
        assert {sequence for sequence, _ in step.places()} == set(step.sequences)
