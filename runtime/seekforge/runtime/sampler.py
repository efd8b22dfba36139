"""Chooses the next token of each row, exactly as sampling from the whole vocabulary would. numpy only.

A step returns the K largest logits of a row and the logsumexp of all. Tokens are laid out by falling logit (equal
ones by rising id) and one uniform draw picks from that layout, so the first K decide whenever the draw, and the
edge of the nucleus, fall inside them. The mass of the rest is known exactly at temperature 1 and between bounds at
others; only if the bounds disagree is the row's full vocabulary fetched. Both ways choose the same token.

The draw of token n is a pure function of (seed, n): a request gives the same tokens in any batch, and again
after it was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from seekforge.runtime.sampling import SamplingParams

#: How many tokens of a whole row are sorted first; eight times as many if they do not decide.
_FIRST_SORT = 4096


@dataclass(frozen=True)
class Draw:
    """What one row is to choose.

    Attributes:
        params: of the request.
        seed: of the request.
        index: how many tokens the request has generated before.
        banned: tokens that must not be chosen; never the whole vocabulary.
    """

    params: SamplingParams
    seed: int = 0
    index: int = 0
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TopLogits:
    """The K largest logits of N rows.

    Attributes:
        logits: [N, K], f32, falling.
        ids: [N, K], i32; of equal logits the lowest id comes first.
        logsumexp: [N], f32, over the whole vocabulary.
        vocab_size: K at most.
    """

    logits: np.ndarray
    ids: np.ndarray
    logsumexp: np.ndarray
    vocab_size: int


def needs_full_logits(params: SamplingParams) -> bool:
    """Whether a row may have to look at its whole vocabulary, so that the step must keep it."""
    return not params.greedy or params.min_tokens > 0


def sample(draws: Sequence[Draw], top: TopLogits, full_logits: Callable[[], np.ndarray]) -> list[int]:
    """Choose one token per row.

    Args:
        draws: one per row.
        top: of those rows.
        full_logits: gives [N, vocab_size], f32; called at most once, and only if a row needs it.

    Returns:
        Token ids in row order.
    """
    full: np.ndarray | None = None
    tokens: list[int] = []
    for row, draw in enumerate(draws):
        token = _from_top(draw, top, row)
        if token is None:
            full = full_logits() if full is None else full
            token = _from_full(draw, full[row])
        tokens.append(token)
    return tokens


def uniform(seed: int, index: int) -> float:
    """Return the draw in [0, 1) for token `index` of a request with `seed`."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def _from_top(draw: Draw, top: TopLogits, row: int) -> int | None:
    """Choose from the K largest logits; None when they do not decide."""
    ids = top.ids[row]
    if draw.params.greedy and not draw.banned:
        return int(ids[0])
    logits = top.logits[row].astype(np.float64)
    kept = ~np.isin(ids, list(draw.banned)) if draw.banned else np.ones(len(ids), bool)
    if not kept.any():
        return None
    if draw.params.greedy:
        return int(ids[kept.argmax()])
    low, high = _tail_mass(logits, float(top.logsumexp[row]), top.vocab_size, draw.params.temperature)
    # A banned token outside the top K is part of the tail, which may then weigh nothing.
    low = low if kept.sum() == len(ids) - len(draw.banned) else 0.0
    mass = np.exp((logits[kept] - logits[0]) / draw.params.temperature)
    if draw.params.top_k:
        mass = mass[: draw.params.top_k]
        low, high = (0.0, 0.0) if len(mass) == draw.params.top_k else (0.0, high)
    picked = _pick(mass, low, high, draw.params.top_p, uniform(draw.seed, draw.index))
    return None if picked is None else int(ids[kept][picked])


def _from_full(draw: Draw, logits: np.ndarray) -> int:
    """Choose from a whole row of logits, sorting no more of it than it takes."""
    params = draw.params
    logits = logits.astype(np.float64)
    logits[list(draw.banned)] = -np.inf
    if params.greedy:
        return int(logits.argmax())
    mass = np.exp((logits - logits.max()) / params.temperature)
    count = min(params.top_k or len(logits), len(logits))
    size = min(_FIRST_SORT, count)
    while True:
        order = _largest(logits, size)
        rest = max(float(mass.sum() - mass[order].sum()), 0.0) if size < count else 0.0
        low = 0.0 if params.top_k else rest
        picked = _pick(mass[order], low, rest, params.top_p, uniform(draw.seed, draw.index))
        if picked is not None:
            return int(order[picked])
        size = min(8 * size, count)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest values, falling; equal ones by rising index."""
    if count == len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _pick(mass: np.ndarray, tail_low: float, tail_high: float, top_p: float, draw: float) -> int | None:
    """Return which element of `mass` the draw falls on, or None if the tail could change that.

    Args:
        mass: unnormalised probabilities, falling.
        tail_low, tail_high: bounds of the mass that follows. When both are 0, `mass` is all there is.
        top_p: the nucleus.
        draw: in [0, 1).
    """
    reach = np.cumsum(mass)
    complete = tail_high == 0
    totals = [reach[-1] + tail_low, reach[-1] + tail_high]
    if top_p < 1:
        edges = [int(np.searchsorted(reach, top_p * total, side="left")) for total in totals]
        edges = [min(edge, len(mass) - 1) for edge in edges] if complete else edges
        if edges[0] != edges[1] or edges[1] >= len(mass):
            return None
        reach = reach[: edges[0] + 1]
        totals = [reach[-1], reach[-1]]
        complete = True
    picks = [int(np.searchsorted(reach, draw * total, side="right")) for total in totals]
    if complete:  # rounding may put a draw next to 1 past the end
        return min(picks[0], len(reach) - 1)
    return picks[0] if picks[0] == picks[1] < len(reach) else None


def _tail_mass(logits: np.ndarray, logsumexp: float, vocab_size: int, temperature: float) -> tuple[float, float]:
    """Bound Σ exp((l − l_0) / T) over the tokens outside the top K.

    With r = 1/T, each l is at most the K-th largest, and the sum at T = 1 is exp(logsumexp) − Σ_top exp(l). For
    n terms of known sum s, none above m, the sum of their r-th powers lies between n·(s/n)^r and s·m^(r−1): in this
    order for r ≥ 1, in the other for r ≤ 1 (power mean; x^r = x·x^(r−1)). f32 rounding of logsumexp widens s.
    """
    count = vocab_size - len(logits)
    if count <= 0 or logits[-1] == -np.inf:
        return 0.0, 0.0
    total = math.exp(logsumexp - logits[0])
    slack = total * (1e-5 + 5e-7 * abs(logsumexp))
    rest = total - float(np.exp(logits - logits[0]).sum())
    power = 1 / temperature
    log_largest = float(logits[-1] - logits[0])
    bounds: list[float] = []
    for known in (max(rest - slack, 0.0), max(rest, 0.0) + slack):
        equal = count * math.exp(min(power * (math.log(known) - math.log(count)), 700)) if known else 0.0
        steep = math.exp(min(math.log(known) + (power - 1) * log_largest, 700)) if known else 0.0
        bounds += [equal, steep]
    most = count * math.exp(power * log_largest)
    return min(bounds[:2]), min(max(bounds[2:]), most)
