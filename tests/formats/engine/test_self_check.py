"""What is stored of a self-check stands beside what a runner gives."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from seekforge.formats.engine.manifest import SelfCheck, SelfCheckRow
from seekforge.formats.engine.self_check import self_check_values
from seekforge.formats.step_io import MODEL, StepInputs


class Outputs(dict[str, np.ndarray]):
    def fetch(self, name: str) -> np.ndarray:
        return self[name]


class Runner:
    """Gives logits [N, V] and their logsumexp [N] as they are."""

    def __init__(self, logits: np.ndarray, logsumexp: np.ndarray) -> None:
        self.outputs = Outputs(logits=logits, logsumexp=logsumexp)
        self.num_blocks = 0

    def allocate_caches(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL) -> Outputs:
        assert graph == MODEL
        self.inputs = inputs
        return Outputs({name: self.outputs[name] for name in outputs})


CHECK = SelfCheck(
    prompt_ids=tuple(range(20, 90)),
    rows=(
        SelfCheckRow(position=0, top_ids=(2, 0), top_logits=(3.0, 1.0), logsumexp=3.5),
        SelfCheckRow(position=69, top_ids=(1,), top_logits=(4.0,), logsumexp=4.25),
    ),
    tolerance=0.01,
    reason="",
    source="",
)


def test_every_stored_value_stands_beside_the_runner_s() -> None:
    runner = Runner(np.array([[1.0, 0.0, 3.005], [0.0, 4.0, 0.0]], np.float32), np.array([3.5, 4.5], np.float32))
    values = list(self_check_values(runner, CHECK))
    assert [(one.position, one.what, one.expected) for one in values] == [
        (0, "the logit of id 2", 3.0),
        (0, "the logit of id 0", 1.0),
        (0, "the logsumexp", 3.5),
        (69, "the logit of id 1", 4.0),
        (69, "the logsumexp", 4.25),
    ]
    assert [one.agrees(CHECK.tolerance) for one in values] == [True, True, True, True, False]
    assert values[-1].difference == pytest.approx(0.25)
    assert runner.num_blocks == 3, "two blocks of 64 tokens, and the scrap block"
    assert runner.inputs.input_ids.tolist() == [list(CHECK.prompt_ids)]
    assert runner.inputs.logits_index.tolist() == [0, 69]


def test_nan_agrees_with_nothing() -> None:
    runner = Runner(np.full((2, 3), np.nan, np.float32), np.array([3.5, 4.25], np.float32))
    assert [one.agrees(float("inf")) for one in self_check_values(runner, CHECK)] == [False, False, True, False, True]
