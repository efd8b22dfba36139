"""Whether what a kernel computed is right: each operator by its own tolerance, against its reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.testing import Case, calc_diff, equal_bits, same_selection

#: calc_diff that a product of FP8 blocks may have: tensor cores add less exactly than f32 (spec §5.2).
PRODUCT_TOLERANCE: Final = 1e-5


def judge(case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[bool, str]:
    """Return whether results are right, and the error in words."""
    if case.op == "DsaCacheWrite":
        first = 1 if got[0].dtype == torch.int8 else 64
        same = all(equal_bits(a[first:], b[first:]) for a, b in zip(got, want, strict=True))
        return same, "bytes equal" if same else "bytes differ"
    if case.op == "MoeRoute":
        worst = float(((got[1] - want[1]).abs() / want[1].abs().clamp_min(1e-20)).max()) if got[1].numel() else 0.0
        return torch.equal(got[0], want[0]) and worst < 1e-5, f"ids equal, weights {worst:.1e}"
    if case.op == "DsaIndexer":
        q, w, cache, table, positions = case.inputs
        attrs = case.attrs
        scores = index_scores(q, w, cache, table, positions, attrs["indexer_fp8"], attrs["index_format"])
        same = same_selection(got[0], want[0], scores, 1e-5)
        return same, "same selection" if same else "another selection"
    x, y = got[0].double(), want[0].double()
    finite = y.isfinite()
    diff = calc_diff(x[finite], y[finite]) if torch.equal(finite, x.isfinite()) else math.inf
    limit = 5e-6 if case.op == "DsaAttention" else PRODUCT_TOLERANCE
    return diff <= limit, f"diff {diff:.1e} of {limit:.0e}"
