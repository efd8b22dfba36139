"""A loaded engine proves itself: stored prompt rows must give the stored logits before it serves."""

from __future__ import annotations

from dataclasses import dataclass

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import SelfCheck
from seekforge.formats.engine.self_check import self_check_values
from seekforge.formats.step_runner import StepRunner


@dataclass(frozen=True)
class SelfCheckResult:
    """How near a loaded engine came.

    Attributes:
        num_values: logits and logsumexps compared.
        largest_difference: the largest difference among those, in logits.
        tolerance: what was allowed.
    """

    num_values: int
    largest_difference: float
    tolerance: float


def run_self_check(runner: StepRunner, check: SelfCheck) -> SelfCheckResult:
    """Prefill the stored prompt whole and compare. Leaves the runner with other caches: allocate them after.

    Raises:
        EngineError: a value differs by more than the tolerance or is not finite; row, id and values are named.
    """
    num_values, largest = 0, 0.0
    for one in self_check_values(runner, check):
        if not one.agrees(check.tolerance):
            raise EngineError(
                f"self-check failed at position {one.position}: {one.what} is {one.value:.6g}, expected "
                f"{one.expected:.6g} within {check.tolerance:.3g} ({check.source}); the engine does not compute what "
                "it was built for: check the files with --verify, then build it again"
            )
        num_values, largest = num_values + 1, max(largest, one.difference)
    return SelfCheckResult(num_values, largest, check.tolerance)
