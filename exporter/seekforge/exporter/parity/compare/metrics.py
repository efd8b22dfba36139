"""How far two tensors, two distributions and two selections are apart. Pure functions of NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["tie", "noise", "wrong"]


@dataclass
class Difference:
    """Accumulates one point over many steps; all in f64.

    Attributes:
        max_abs: the largest |x − y|.
        sum_square_error: the sum of (x − y)².
        sum_xy: the sum of x · y; `sum_xx` and `sum_yy` likewise.
        count: how many values were compared.
        not_finite: how many are NaN or inf on one side only.
    """

    max_abs: float = 0.0
    sum_square_error: float = 0.0
    sum_xy: float = 0.0
    sum_xx: float = 0.0
    sum_yy: float = 0.0
    count: int = 0
    not_finite: int = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Count `x` (judged) against `y` (the reference)."""
        x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
        finite = np.isfinite(x) & np.isfinite(y)
        self.not_finite += int((np.isfinite(x) != np.isfinite(y)).sum())
        x, y = x[finite], y[finite]
        if x.size:
            error = x - y
            self.max_abs = max(self.max_abs, float(np.abs(error).max()))
            self.sum_square_error += float(error @ error)
            self.sum_xy += float(x @ y)
            self.sum_xx += float(x @ x)
            self.sum_yy += float(y @ y)
        self.count += x.size

    @property
    def rms(self) -> float:
        """Return the root mean square of the reference."""
        return (self.sum_yy / self.count) ** 0.5 if self.count else 0.0

    @property
    def max_relative(self) -> float:
        """Return the largest error in parts of the reference's root mean square."""
        return self.max_abs / (self.rms or 1.0)

    @property
    def rms_relative(self) -> float:
        """Return the root mean square of the error in parts of that of the reference."""
        return (self.sum_square_error / self.sum_yy) ** 0.5 if self.sum_yy else float(self.sum_square_error > 0)

    @property
    def calc_diff(self) -> float:
        """Return 1 − 2·Σxy / Σ(x² + y²), as DeepGEMM has it (spec §11); 0 when both are zero."""
        total = self.sum_xx + self.sum_yy
        return max(0.0, 1.0 - 2.0 * self.sum_xy / total) if total else 0.0

    @property
    def cosine_difference(self) -> float:
        """Return 1 − cos of the angle between the two as vectors."""
        norm = (self.sum_xx * self.sum_yy) ** 0.5
        return max(0.0, 1.0 - self.sum_xy / norm) if norm else 0.0


def row_errors(x: np.ndarray, y: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Return [n], the largest |x − y| of each row in parts of the root mean square of `y` (or of `scale`).

    What is not finite is inf.
    """
    if x.size == 0:
        return np.zeros(len(x))
    x, y = x.reshape(len(x), -1).astype(np.float64), y.reshape(len(y), -1).astype(np.float64)
    rms = scale or float(np.sqrt((y * y).mean())) or 1.0
    error = np.abs(x - y).max(-1) / rms
    return np.where(np.isfinite(error), error, np.inf)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last axis, in f64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclass(frozen=True)
class LogitRows:
    """What is measured of each row of logits: [n] each.

    Attributes:
        error: the largest |difference| in parts of the spread (standard deviation) of the reference's logits.
        kl: KL(reference ‖ judged) of the next token, in nats.
        top1: whether both like the same token best.
        top10: the overlap of the ten best, 0 to 1.
        nll: −log p of the token that follows, by the judged side; NaN where none is known.
        nll_reference: the same by the reference.
    """

    error: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top10: np.ndarray
    nll: np.ndarray
    nll_reference: np.ndarray


def compare_logits(x: np.ndarray, y: np.ndarray, following: np.ndarray) -> LogitRows:
    """Compare rows of logits.

    Args:
        x: [n, V], the judged side's.
        y: [n, V], the reference's.
        following: [n] int, the token that follows in the text; −1 where none is known.
    """
    px, py = log_softmax(x), log_softmax(y)
    kl = np.maximum((np.exp(py) * (py - px)).sum(-1), 0.0)
    k = min(10, x.shape[1])
    best = [np.argpartition(-side, k - 1, axis=-1)[:, :k] for side in (x, y)]
    overlap = np.array([len(np.intersect1d(a, b)) / k for a, b in zip(*best)])
    rows, known = np.arange(len(x)), following >= 0
    spread = float(y.astype(np.float64).std()) or 1.0
    error = np.abs(x.astype(np.float64) - y).max(-1) / spread
    return LogitRows(
        error=np.where(np.isfinite(error), error, np.inf),
        kl=np.where(np.isfinite(kl), kl, np.inf),
        top1=x.argmax(-1) == y.argmax(-1),
        top10=overlap,
        nll=np.where(known, -px[rows, following], np.nan),
        nll_reference=np.where(known, -py[rows, following], np.nan),
    )


@dataclass(frozen=True)
class Flip:
    """One key or expert that only one side chose.

    Attributes:
        step: the number of the step in which a row chose it.
        sequence: the sequence of that row.
        position: the position of that row.
        chosen: the key's position or the expert's id.
        by: the side that chose it.
        gap: the distance of its score to the boundary, in parts of the row's spread of scores.
        kind: what the gap says: tie, noise or wrong.
    """

    step: int
    sequence: int
    position: int
    chosen: int
    by: Literal["judged", "reference"]
    gap: float
    kind: Kind


def classify(gap: float, tolerance: float) -> Kind:
    """Name a gap: 0 is a tie (any choice is right), within `tolerance` is numeric noise, else the choice is wrong."""
    if gap == 0.0:
        return "tie"
    return "noise" if gap <= tolerance else "wrong"


def farthest(flips: Iterable[Flip], most: int) -> list[Flip]:
    """Return at most so many flips, those with the widest gaps first; NaN is wider than anything."""
    return sorted(flips, key=lambda flip: -flip.gap if flip.gap == flip.gap else -np.inf)[:most]


def different(judged: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is only in `judged`, and what is only in `reference`, of two sets; −1 is none."""
    by_judged, by_reference = judged[judged >= 0], reference[reference >= 0]
    return np.setdiff1d(by_judged, by_reference), np.setdiff1d(by_reference, by_judged)


def key_gaps(scores: np.ndarray, reference: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the distance of `keys` to the boundary of a row, in parts of the spread of its scores.

    Args:
        scores: [L] of the visible keys (a key beyond them has an infinite gap).
        reference: the keys that the reference chose.
        keys: those to measure.
    """
    chosen = reference[reference >= 0]
    spread = float(scores.max() - scores.min()) or 1.0
    inside = keys < len(scores)
    others = np.setdiff1d(np.arange(len(scores)), chosen)
    last = scores[chosen].min()
    first_out = scores[others].max() if len(others) else -np.inf
    # a key that was left out is measured to the last that was taken, one that was taken to the first left out
    taken = np.isin(keys, chosen)
    gaps = np.full(len(keys), np.inf)
    gaps[inside & ~taken] = np.abs(scores[keys[inside & ~taken]] - last)
    gaps[inside & taken] = np.abs(scores[keys[inside & taken]] - first_out)
    return gaps / spread


def expert_gaps(
    biased: np.ndarray, reference: np.ndarray, experts: np.ndarray, n_group: int, topk_group: int
) -> np.ndarray:
    """Return the distance of `experts` to the boundary that decides about them, in units of the biased score.

    An expert is judged by its own score, or by that of a group (the sum of its best two) where that is nearer: when
    a group is dropped its experts go with it, and others that are far below take their places.

    Args:
        biased: [E] score plus bias, no group masked.
        reference: experts that the reference chose.
        experts: those to measure.
        n_group: how many groups the experts are in.
        topk_group: how many groups are kept.
    """
    groups = biased.reshape(n_group, -1)
    group_score = np.sort(groups, -1)[:, -2:].sum(-1)
    order = np.argsort(-group_score, kind="stable")
    kept = order[:topk_group]
    masked = np.where(np.isin(np.arange(n_group), kept)[:, None], groups, -np.inf).ravel()
    size = groups.shape[1]
    last = masked[reference].min()
    rest = np.setdiff1d(np.flatnonzero(np.isfinite(masked)), reference)
    first_out = masked[rest].max() if len(rest) else -np.inf
    gaps, through = [], [np.inf]
    for expert in experts:
        group = expert // size
        if not np.isfinite(masked[expert]):  # its group was dropped
            gaps.append(np.inf)
            through.append(group_score[kept[-1]] - group_score[group])
        elif expert in reference:
            gaps.append(masked[expert] - first_out)
            if topk_group < n_group:
                through.append(group_score[group] - group_score[order[topk_group]])
        else:
            gaps.append(last - masked[expert])
    return np.minimum(np.abs(np.array(gaps, np.float64)), min(through))
