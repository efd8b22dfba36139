"""A loaded engine proves itself: stored prompt rows must give the stored logits before it serves."""

from __future__ import annotations

from dataclasses import dataclass

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import SelfCheck
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.step_io import lay_out
from seekforge.runtime.backends.base import Backend


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


def run_self_check(backend: Backend, check: SelfCheck, block_size: int) -> SelfCheckResult:
    """Prefill the stored prompt whole and compare. Leaves the backend with other caches: allocate them after.

    Raises:
        EngineError: a value differs by more than the tolerance or is not finite; row, id and values are named.
    """
    length = len(check.prompt_ids)
    num_blocks = blocks_needed(length, block_size)
    backend.allocate_caches(num_blocks + 1)
    blocks = list(range(1, num_blocks + 1))
    step = lay_out([check.prompt_ids], [0], [blocks], [row.position for row in check.rows])
    results = backend.run(step, outputs={"logits", "logsumexp"})
    logits, logsumexp = results.fetch("logits"), results.fetch("logsumexp")
    num_values, largest = 0, 0.0
    for index, row in enumerate(check.rows):
        values = [(f"the logit of id {token}", logits[index, token]) for token in row.top_ids]
        values.append(("the logsumexp", logsumexp[index]))
        for (what, actual), expected in zip(values, (*row.top_logits, row.logsumexp), strict=True):
            difference = abs(float(actual) - expected)
            if not difference <= check.tolerance:  # so written, NaN fails
                raise EngineError(
                    f"self-check failed at position {row.position}: {what} is {float(actual):.6g}, expected "
                    f"{expected:.6g} within {check.tolerance:.3g} ({check.source}); the engine does not compute what "
                    "it was built for: check the files with --verify, then build it again"
                )
            num_values, largest = num_values + 1, max(largest, difference)
    return SelfCheckResult(num_values, largest, check.tolerance)
