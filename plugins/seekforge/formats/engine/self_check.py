"""Running a stored self-check: the prompt is prefilled whole, and every stored value stands beside the new one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from seekforge.formats.engine.manifest import SelfCheck
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.step_io import lay_out
from seekforge.formats.step_runner import StepRunner


class SelfCheckValue(NamedTuple):
    """One value of a self-check.

    Attributes:
        position: the position of the prompt behind which it stands.
        what: what it is, in words.
        value: what the runner gave, in logits.
        expected: what is stored.
    """

    position: int
    what: str
    value: float
    expected: float

    @property
    def difference(self) -> float:
        """How far the two lie apart; NaN if the runner gave NaN."""
        return abs(self.value - self.expected)

    def agrees(self, tolerance: float) -> bool:
        """Whether they lie within `tolerance`; NaN does not."""
        return self.difference <= tolerance


def self_check_values(runner: StepRunner, check: SelfCheck) -> Iterator[SelfCheckValue]:
    """Prefill the stored prompt and yield every stored logit and logsumexp. Leaves the runner with other caches."""
    num_blocks = blocks_needed(len(check.prompt_ids))
    runner.allocate_caches(num_blocks + 1)
    step = lay_out([check.prompt_ids], [0], [range(1, num_blocks + 1)], [row.position for row in check.rows])
    results = runner.run(step, outputs=("logits", "logsumexp"))
    logits, logsumexp = results.fetch("logits"), results.fetch("logsumexp")
    for index, row in enumerate(check.rows):
        for token, expected in zip(row.top_ids, row.top_logits, strict=True):
            yield SelfCheckValue(row.position, f"the logit of id {token}", float(logits[index, token]), expected)
        yield SelfCheckValue(row.position, "the logsumexp", float(logsumexp[index]), row.logsumexp)
