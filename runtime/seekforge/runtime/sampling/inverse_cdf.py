"""The order in which a row's tokens are laid out, and where a draw falls on it. Pure functions over numpy arrays.

Tokens stand by falling logit, equal ones by rising id; each takes as much room as it is likely. Of a row only the
first are known, of the others how much room they take together, between two bounds. What is kept by top-k, top-p and
min-p, and so what is picked, only grows with the tail: if both bounds pick the same, so does the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from seekforge.runtime.sampling.params import SamplingParams

#: Of the hash that draws are made with (splitmix64).
_STEP, _OFFSET, _DROP = np.uint64(0xD1342543DE82EF95), np.uint64(0x632BE59BD9B4E019), np.uint64(11)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
#: For the two bounds of a tail, the lesser first.
_SIGNS = np.array([[-1.0], [1.0]])


@dataclass(frozen=True)
class SamplingMetadata:
    """How each of N rows chooses; made once for a batch and kept while it stays together. All arrays are [N].

    Attributes:
        temperature, top_k, top_p, min_p: the values of `SamplingParams`; a temperature that is greedy is 0.
        power: 1 / temperature; 1 for greedy rows, whose mass nobody looks at.
        seed: hashed once.
        all_greedy, any_greedy, unscaled, has_top_k, has_top_p, all_top_p, has_min_p: what there is to do at all.
            `unscaled`: no row has a power other than 1.
    """

    temperature: np.ndarray
    power: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    all_greedy: bool
    any_greedy: bool
    unscaled: bool
    has_top_k: bool
    has_top_p: bool
    all_top_p: bool
    has_min_p: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int]) -> SamplingMetadata:
        """Collect the rules of rows with these parameters and seeds."""
        temperature = np.array([0.0 if p.greedy else p.temperature for p in params], np.float64)
        greedy = temperature == 0
        power = 1 / np.where(greedy, 1.0, temperature)
        top_k = np.array([p.top_k for p in params], np.int64)
        top_p = np.array([p.top_p for p in params], np.float64)
        min_p = np.array([p.min_p for p in params], np.float64)
        return SamplingMetadata(
            temperature,
            power,
            top_k,
            top_p,
            min_p,
            _mix(np.array(seeds, np.uint64) + np.uint64(0x9E3779B97F4A7C15)),
            all_greedy=bool(greedy.all()),
            any_greedy=bool(greedy.any()),
            unscaled=bool((power == 1).all()),
            has_top_k=bool(top_k.any()),
            has_top_p=bool((top_p < 1).any()),
            all_top_p=bool((top_p < 1).all()),
            has_min_p=bool(min_p.any()),
        )

    def take(self, rows: np.ndarray) -> SamplingMetadata:
        """Return some of the rows. What there is to do stays that of all."""
        arrays = {n: getattr(self, n)[rows] for n in ("temperature", "power", "top_k", "top_p", "min_p", "seed")}
        return replace(self, **arrays)

    def draws(self, index: np.ndarray) -> np.ndarray:
        """Return [N] draws in [0, 1): for token `index` of each row's completion. A hash (splitmix64), twice."""
        value = _mix(self.seed ^ (index.astype(np.uint64) * _STEP + _OFFSET))
        return (value >> _DROP) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> _SHIFTS[0])) * _FACTORS[0]
    value = (value ^ (value >> _SHIFTS[1])) * _FACTORS[1]
    return value ^ (value >> _SHIFTS[2])


@dataclass(frozen=True)
class Layout:
    """The beginning of each of N rows.

    Attributes:
        ids: [N, C] token ids, in the order in which they are laid out.
        mass: [N, C], unnormalized probabilities, falling; 0 beyond `known`.
        known: [N] how many columns are certain to be the first; None: all.
        tail: [2, N] least and most mass that follows. When the second is 0, nothing follows.
    """

    ids: np.ndarray
    mass: np.ndarray
    known: np.ndarray | None
    tail: np.ndarray


def pick(layout: Layout, rules: SamplingMetadata, draws: np.ndarray) -> np.ndarray:
    """Return [N] which column each draw falls on, or −1 where the tail could change that.

    Min-p, top-k and top-p each cut the layout to a beginning; top-p counts what the others left.
    """
    mass, tail = layout.mass, layout.tail
    width = mass.shape[1]
    known = np.full(len(mass), width) if layout.known is None else layout.known
    if rules.has_top_k:
        cut = (rules.top_k > 0) & (rules.top_k <= known)
        known = np.where(cut, rules.top_k, known)
        tail = np.stack([np.where(rules.top_k > 0, 0.0, tail[0]), np.where(cut, 0.0, tail[1])])
    if rules.has_min_p:
        limited = rules.min_p > 0
        columns = np.arange(width) < known[:, None]
        likely = np.maximum(((mass >= (rules.min_p * mass[:, 0])[:, None]) & columns).sum(1), 1)
        cut = limited & (likely < known)
        known = np.where(cut, likely, known)
        # of the tail, all or nothing may be likely enough
        tail = np.stack([np.where(limited, 0.0, tail[0]), np.where(cut, 0.0, tail[1])])
    rows = np.arange(len(mass))
    reach = np.cumsum(mass, axis=1)
    last, good = reach[:, -1], np.True_
    if layout.known is not None or rules.has_top_k or rules.has_min_p:
        last = reach[rows, np.maximum(known, 1) - 1]
        reach = np.minimum(reach, last[:, None])
        good = (known > 0) & (last > 0)
    # From here on the first axis of two says which bound of the tail is believed. What is kept ends with column
    # `held`; `open_tail` is what follows it and is kept as well, None: nothing.
    held, total, open_tail = known - 1, last + tail, tail
    if rules.has_top_p:
        edge = first_true(reach >= (rules.top_p * total)[..., None])
        inside, edge = edge < known, np.minimum(edge, held)
        if rules.all_top_p:
            good, held, open_tail = good & inside, edge, None
        else:
            nucleus = rules.top_p < 1
            good = good & (inside | ~nucleus)
            held, open_tail = np.where(nucleus, edge, held), np.where(nucleus, 0.0, tail)
    if rules.has_top_p:
        total = reach[rows, np.maximum(held, 0)]
        total = total if open_tail is None else total + open_tail
    picked = first_true(reach > (draws * total)[..., None])
    # rounding may put a draw next to 1 past the end
    nearest = np.minimum(picked, held)
    if open_tail is None:
        picked = nearest
    else:
        picked = np.where(open_tail == 0, nearest, picked)
        good = good & (picked < known)
    if rules.any_greedy:
        greedy = rules.temperature == 0
        picked, good = np.where(greedy, 0, picked), np.where(greedy, known > 0, good)
    return np.where(np.all(good & (picked[0] == picked[1]), axis=0), picked[0], -1)


def first_true(mask: np.ndarray) -> np.ndarray:
    """Return the first true column of each row of a mask that stays true, [..., C] -> [...]; C where none is."""
    return np.where(mask[..., -1], mask.argmax(-1), mask.shape[-1])


def tail_bounds(
    shifted: np.ndarray,
    first: np.ndarray,
    logsumexp: np.ndarray,
    num_others: int,
    rules: SamplingMetadata,
    mass: np.ndarray,
) -> np.ndarray:
    """Bound Σ exp(r · (l − l_0)) over the tokens that are not among the known, per row; r is the row's power.

    Each l is at most the last of the known, and the sum at r = 1 is exp(logsumexp − l_0) − Σ_known exp(l − l_0). For n
    terms of known sum s, none above m, the sum of their r-th powers lies between n·(s/n)^r and s·m^(r−1): in this order
    for r ≥ 1, in the other for r ≤ 1 (power mean; x^r = x·x^(r−1)). f32 rounding of logsumexp widens s.

    Args:
        shifted: [N, C], l − l_0 of the known tokens, falling.
        first: [N], l_0.
        logsumexp: [N], over all tokens.
        num_others: tokens that are not known.
        rules: the sampling rules of these rows.
        mass: [N, C], exp(r · shifted).

    Returns:
        [2, N]: least and most.
    """
    if num_others <= 0:
        return np.zeros((2, len(first)))
    logsumexp = logsumexp.astype(np.float64)
    total = np.exp(logsumexp - first)
    slack = total * (1e-5 + 5e-7 * np.abs(logsumexp))
    rest = total - (mass if rules.unscaled else np.exp(shifted)).sum(1)
    sums = np.maximum(np.maximum(rest, 0.0) + slack * _SIGNS, 0.0)
    most = num_others * mass[:, -1]
    if rules.unscaled:
        return np.minimum(sums, most)
    log_largest = np.maximum(shifted[:, -1], -1e30)
    with np.errstate(divide="ignore"):
        log_sums = np.log(sums)
    equal = num_others * np.exp(np.minimum(rules.power * (log_sums - math.log(num_others)), 700))
    steep = np.exp(np.minimum(log_sums + (rules.power - 1) * log_largest, 700))
    high = np.minimum(np.maximum(equal[1], steep[1]), most)
    return np.stack([np.minimum(np.minimum(equal[0], steep[0]), high), high])
