"""Test vectors of `SumRanks`."""

from __future__ import annotations

from seekforge.plugins.testing import Case, Draw


def cases() -> list[Case]:
    """Return the vectors: the two forms in which a layer sums."""
    draw = Draw(7)
    return [
        Case("SumRanks", "attention", (draw.normal(2, 3, 128),), {"num_ranks": 2}),
        Case("SumRanks", "experts", (draw.normal(5, 128),), {"num_ranks": 8}),
    ]
