"""Find the first bad layer in O(log layers) runs, when the taps of all layers do not fit.

Layers [a, b) of PyTorch are given what the engine had at a, and compared with what the engine had at b: what is wrong
before a is not blamed on them. Each probe is one run of the engine that shows two places, and one walk of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from seekforge.exporter.parity.compare.dumps import stream_rows
from seekforge.exporter.parity.compare.metrics import row_errors
from seekforge.formats.dump import Dump

#: A segment is bad when its error is beyond this many times what a change of its input by 1e-6 gives, plus a floor.
SEGMENT_FACTOR, SEGMENT_FLOOR = 3.0, 1e-5
#: Quantiles of the rows' errors, of the engine and of the noise. Most rows decide, not the few that a discrete choice
#: moved. Where e4m3 roundings flip, luck decides which rows they move, in either run: half of the engine's rows decide.
_SMOOTH = ((0.5, 0.9), (0.5, 0.9))
_QUANTIZED = ((0.5,), (0.9,))


def first_bad_layer(layers: tuple[int, int], bad: Callable[[int, int], bool]) -> int | None:
    """Return the first layer of [a, b) at fault, or None if the whole range is right.

    Args:
        layers: the range.
        bad: says whether layers [a, b) make a wrong output of the right input. Called at most
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


def is_quantized(numerics: Mapping[str, object]) -> bool:
    """Whether anything is rounded to FP8."""
    return numerics.get("act_quant") != "none" or bool(numerics.get("kv_fp8")) or bool(numerics.get("indexer_fp8"))


@dataclass(frozen=True)
class Spread:
    """How far most rows of two runs lie apart, by the quantile that stands worst against what is allowed.

    Attributes:
        error: how far they lie apart at that quantile.
        allowed: how far they may.
    """

    error: float
    allowed: float

    @property
    def bad(self) -> bool:
        """Whether the error is beyond what is allowed; NaN is."""
        return not self.error <= self.allowed


def spread(
    engine: Dump, reference: Dump, noise: Dump, rows: Callable[[Dump, int], np.ndarray | None], graph: str = "model"
) -> Spread | None:
    """Compare an engine with PyTorch by how far PyTorch is from itself, `noise`, over all steps of a graph.

    Args:
        engine: the engine's dump.
        reference: PyTorch's dump of the same plan.
        noise: PyTorch's from inputs changed by rounding noise.
        rows: takes a dump and a step; returns rows to compare, or None where the dump does not have them. Such steps
            are left out.
        graph: model or mtp.

    Returns:
        None where no step has these rows on all sides.
    """
    errors: list[np.ndarray] = []
    natural: list[np.ndarray] = []
    for number, (_, step) in enumerate(reference.cases):
        if step.graph != graph:
            continue
        actual, expected, moved = (rows(dump, number) for dump in (engine, reference, noise))
        if actual is not None and expected is not None and moved is not None:
            errors.append(row_errors(actual, expected))
            natural.append(row_errors(moved, expected))
    if not errors:
        return None
    quantiles = _QUANTIZED if is_quantized(reference.side.numerics) else _SMOOTH
    pairs = zip((errors, natural), quantiles, strict=True)
    of_engine, of_noise = (np.quantile(np.concatenate(parts), wanted, method="nearest") for parts, wanted in pairs)
    bounds = SEGMENT_FACTOR * of_noise + SEGMENT_FLOOR
    worst = int(np.argmax(of_engine / bounds))
    return Spread(float(of_engine[worst]), float(bounds[worst]))


def segment_is_bad(engine: Dump, reference: Dump, noise: Dump, stop: int) -> bool:
    """Compare what goes into layer `stop`: the engine's, PyTorch's from the engine's input, and the same perturbed."""
    one = spread(engine, reference, noise, lambda dump, number: stream_rows(dump, number, stop))
    assert one is not None, stop
    return one.bad
