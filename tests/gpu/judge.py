"""Whether what a kernel computed is right: each operator by its own tolerance, against its reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from seekforge.exporter.parity.compare.metrics import expert_gaps
from seekforge.exporter.parity.compare.selections import FLOOR_EXPERTS
from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.quant import quantize
from seekforge.plugins.testing import Case, calc_diff, equal_bits, same_selection

#: calc_diff that a product of FP8 blocks may have: tensor cores add less exactly than f32 (spec §5.2).
PRODUCT_TOLERANCE: Final = 1e-5
#: calc_diff of a norm in bf16: sums in another order, and single values that round otherwise.
NORM_TOLERANCE: Final = 1e-6


def judge(case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[bool, str]:
    """Return whether results are right, and the error in words."""
    if case.op in ("DsaCacheWrite", "MlaCacheWrite"):
        first = 1 if got[0].dtype == torch.int8 else 64
        same = all(equal_bits(a[first:], b[first:]) for a, b in zip(got, want, strict=True))
        return same, "bytes equal" if same else "bytes differ"
    if case.op == "AddRmsNormQuantize":
        return _judge_norm(got, want)
    if case.op == "MoeRoute":
        return _judge_route(case.inputs, case.attrs, got, want)
    if case.op == "DsaIndexer":
        q, w, cache, table, positions = case.inputs
        attrs = case.attrs
        scores = index_scores(q, w, cache, table, positions, attrs["indexer_fp8"], attrs["index_format"])
        same = same_selection(got[0], want[0], scores, 1e-5)
        return same, "same selection" if same else "another selection"
    x, y = got[0].double(), want[0].double()
    finite = y.isfinite()
    diff = calc_diff(x[finite], y[finite]) if torch.equal(finite, x.isfinite()) else math.inf
    limit = 5e-6 if case.op in ("DsaAttention", "MlaAttention") else PRODUCT_TOLERANCE
    return diff <= limit, f"diff {diff:.1e} of {limit:.0e}"


def _judge_norm(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[bool, str]:
    """Judge a norm by its values, and its codes as those of the values that it gave: one may round otherwise."""
    total, y, codes, scale = got
    wanted, scales = quantize(y)
    if not equal_bits(total, want[0]):
        return False, "another sum"
    if not (equal_bits(codes, wanted.view(torch.int32)) and equal_bits(scale, scales)):
        return False, "codes of other values"
    diff = calc_diff(y.double(), want[1].double())
    return diff <= NORM_TOLERANCE, f"diff {diff:.1e} of {NORM_TOLERANCE:.0e}"


def _judge_route(
    inputs: Sequence[Tensor], attrs: Mapping[str, Any], got: Sequence[Tensor], want: Sequence[Tensor]
) -> tuple[bool, str]:
    """Judge chosen experts as parity does: another one is right where it lies as near to the boundary as noise.

    Experts come by falling biased score, and neighbors may change places within the same noise. Weights are those of
    the experts that were chosen.
    """
    logits, bias = inputs
    scores = torch.sigmoid(logits)
    biased = scores + bias
    ids, worst, gap, ties = got[0].long(), 0.0, 0.0, 0
    valid = (ids >= 0) & (ids < logits.shape[1])
    if got[0].shape != want[0].shape or not bool(valid.all()):
        return False, "ids of no expert"
    for row, (chosen, theirs) in enumerate(zip(ids, want[0].long(), strict=True)):
        if len(chosen.unique()) != len(chosen):
            return False, f"row {row} chose an expert twice"
        differ = sorted(set(chosen.tolist()) ^ set(theirs.tolist()))
        if differ:
            found = expert_gaps(
                biased[row].numpy(), theirs.numpy(), torch.tensor(differ).numpy(), attrs["n_group"], attrs["topk_group"]
            )
            gap, ties = max(gap, float(found.max())), ties + 1
            expected = scores[row][chosen]
            expected = (
                expected / (expected.sum() + 1e-20) * attrs["scale"] if attrs["norm"] else expected * attrs["scale"]
            )
        else:
            expected = want[1][row][(theirs == chosen[:, None]).int().argmax(-1)]
        falling = biased[row][chosen]
        gap = max(gap, float((falling[1:] - falling[:-1]).max()) if len(falling) > 1 else 0.0)
        worst = max(worst, float(((got[1][row] - expected).abs() / expected.abs().clamp_min(1e-20)).max()))
    text = f"{ties} near ties" if ties else "ids equal"
    if gap > FLOOR_EXPERTS:
        text = f"other experts, gap {gap:.1e}"
    return gap <= FLOOR_EXPERTS and worst < 1e-5, f"{text}, weights {worst:.1e}"
