"""Find the first bad layer in O(log layers) runs, when the taps of all layers do not fit.

Layers [a, b) of PyTorch are given what the engine had at a, and compared with what the engine had at b: what is wrong
before a is not blamed on them. Each probe is one run of the engine that shows two places, and one walk of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from seekforge.exporter.parity.compare import stream_rows
from seekforge.exporter.parity.metrics import row_errors
from seekforge.plugins.formats.dump import Dump

#: A segment is bad when its error is beyond this many times what a change of its input by 1e-6 gives, plus a floor.
SEGMENT_FACTOR, SEGMENT_FLOOR = 3.0, 1e-5
#: Most rows decide, not the few that a discrete choice or a rounding moved.
_QUANTILES = (0.5, 0.9)


def first_bad_layer(layers: tuple[int, int], bad: Callable[[int, int], bool]) -> int | None:
    """Return the first layer of [a, b) at fault, or None if the whole range is right.

    Args:
        layers: the range.
        bad: whether layers [a, b), given the right input, give a wrong output. Called at most
            1 + ⌈log2(number of layers)⌉ times.
    """
    low, high = layers
    if not bad(low, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if bad(low, middle):
            high = middle
        else:
            low = middle
    return low


def segment_is_bad(engine: Dump, reference: Dump, noise: Dump, stop: int) -> bool:
    """Compare what goes into layer `stop`: the engine's, PyTorch's from the engine's input, and the same perturbed."""
    found: list[np.ndarray] = []
    natural: list[np.ndarray] = []
    for number, (_, step) in enumerate(reference.cases):
        if step.graph != "model":
            continue
        ours, theirs, other = (stream_rows(dump, number, stop) for dump in (engine, reference, noise))
        assert ours is not None and theirs is not None and other is not None, stop
        found.append(row_errors(ours, theirs))
        natural.append(row_errors(other, theirs))
    error, bound = (np.quantile(np.concatenate(rows), _QUANTILES) for rows in (found, natural))
    return bool((~(error <= SEGMENT_FACTOR * bound + SEGMENT_FLOOR)).any())
