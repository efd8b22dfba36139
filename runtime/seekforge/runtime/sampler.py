"""Chooses the next token of each row, exactly as sampling from the whole vocabulary would. numpy only.

A step returns the K largest logits of a row and the logsumexp of all. Tokens are laid out by falling logit (equal
ones by rising id) and one uniform draw picks from that layout, so the first few decide whenever the draw, and the
edge of the nucleus, fall inside them. The mass of the rest is known exactly at temperature 1 and between bounds at
others; only if the bounds disagree is more looked at: first all K, then the row's whole vocabulary. Each way
chooses the same token.

The draw of token n is a pure function of (seed, n): a request gives the same tokens in any batch, again after it
was interrupted, and with speculation or without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from seekforge.runtime.backends.base import StepOutputs
from seekforge.runtime.edits import Edit
from seekforge.runtime.sampling import SamplingParams

#: How many of the K largest are looked at first: enough for most rows, and little work.
_FIRST_COLUMNS = 32
#: How many tokens of a whole row are sorted first; eight times as many if they do not decide.
_FIRST_SORT = 4096
#: What `choose` gives for a row of which every token is banned.
NO_TOKEN = -1


@dataclass(frozen=True)
class TopLogits:
    """The K largest logits of N rows.

    Attributes:
        logits: [N, K], f32, falling.
        ids: [N, K], i32; of equal logits the lowest id comes first.
        logsumexp: [N], f32, over the whole vocabulary.
        vocab_size: K at most.
    """

    OUTPUTS: ClassVar = ("top_logits", "top_ids", "logsumexp")

    logits: np.ndarray
    ids: np.ndarray
    logsumexp: np.ndarray
    vocab_size: int

    @staticmethod
    def of(results: StepOutputs, vocab_size: int) -> TopLogits:
        """Fetch those of a step that was asked for `OUTPUTS`."""
        logits, ids, logsumexp = (results.fetch(name) for name in TopLogits.OUTPUTS)
        return TopLogits(logits, ids, logsumexp, vocab_size)

    def take(self, rows: np.ndarray) -> TopLogits:
        """Return some of the rows."""
        return TopLogits(self.logits[rows], self.ids[rows], self.logsumexp[rows], self.vocab_size)


@dataclass(frozen=True)
class Rules:
    """How each of N rows chooses; made once for a batch and kept while it stays together. All arrays are [N]."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    all_greedy: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int]) -> Rules:
        """Collect the rules of rows with these parameters and seeds."""
        temperature = np.array([p.temperature for p in params], np.float64)
        return Rules(
            temperature,
            np.array([p.top_k for p in params], np.int64),
            np.array([p.top_p for p in params], np.float64),
            np.array([p.min_p for p in params], np.float64),
            np.array(seeds, np.uint64),
            not temperature.any(),
        )

    def take(self, rows: np.ndarray) -> Rules:
        """Return some of the rows."""
        temperature = self.temperature[rows]
        arrays = (self.top_k[rows], self.top_p[rows], self.min_p[rows], self.seed[rows])
        return Rules(temperature, *arrays, not temperature.any())


def needs_full_logits(params: SamplingParams) -> bool:
    """Whether a row may have to look at its whole vocabulary, so that the step must keep it."""
    return not params.greedy or params.edits_logits or params.logprobs is not None or params.best_of is not None


def choose(
    rules: Rules,
    index: np.ndarray,
    edits: Mapping[int, Edit],
    top: TopLogits,
    full_logits: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Choose one token per row.

    Args:
        rules: of N rows.
        index: [N], which token of its completion each row chooses.
        edits: row -> what its logits are changed by first.
        top: of those rows.
        full_logits: gives whole rows, [M, vocab_size] f32, for [M] rows; called at most once, for those that need it.

    Returns:
        [N] token ids, int64; `NO_TOKEN` where nothing may be chosen.
    """
    if rules.all_greedy and not edits:
        return top.ids[:, 0].astype(np.int64)
    draws = uniforms(rules.seed, index)
    tokens = np.full(len(draws), NO_TOKEN, np.int64)
    count, width = top.ids.shape
    open_rows = np.arange(count)
    if edits:
        plain = np.array([row for row in range(count) if row not in edits], np.int64)
        edited = np.array(sorted(edits), np.int64)
        _decide(edited, _edited_layout(edited, edits, rules, top), rules, draws, tokens)
    else:
        plain, edited = open_rows, open_rows[:0]
    for columns in dict.fromkeys((min(_FIRST_COLUMNS, width), width)):
        if len(plain):
            _decide(plain, _layout(plain, columns, rules, top), rules, draws, tokens)
            plain = plain[tokens[plain] == NO_TOKEN]
    left = np.array([*plain.tolist(), *edited[tokens[edited] == NO_TOKEN].tolist()], np.int64)
    for row, logits in zip(left.tolist(), full_logits(left) if len(left) else ()):
        full = logits.astype(np.float64)
        if row in edits:
            full = edits[row].apply(full, np.arange(len(full)))
        tokens[row] = _from_full(rules.take(np.array([row])), draws[row : row + 1], full)
    return tokens


def uniforms(seed: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return draws in [0, 1): for token `index` of a completion with `seed`, both [N]. A hash (splitmix64), twice."""
    value = _mix(seed.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    value = _mix(value ^ (index.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x632BE59BD9B4E019)))
    return (value >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class _Layout:
    """The beginning of each row's layout.

    Attributes:
        ids: [N, C] token ids, in the order in which they are laid out.
        mass: [N, C], unnormalised probabilities, falling; 0 beyond `known`.
        known: [N] how many columns are certain to be the first.
        low, high: [N] bounds of the mass that follows. When both are 0, nothing follows.
    """

    ids: np.ndarray
    mass: np.ndarray
    known: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _layout(rows: np.ndarray, columns: int, rules: Rules, top: TopLogits) -> _Layout:
    """Lay out rows whose logits are not changed."""
    part = top if len(rows) == len(top.ids) else top.take(rows)
    logits = part.logits[:, :columns].astype(np.float64)
    power = _power(rules.temperature[rows])
    mass = np.exp((logits - logits[:, :1]) * power[:, None])
    logsumexp = part.logsumexp.astype(np.float64)
    low, high = _tail_bounds(logits, logsumexp, top.vocab_size, power, mass if (power == 1).all() else None)
    return _Layout(part.ids[:, :columns], mass, np.full(len(rows), columns), low, high)


def _edited_layout(rows: np.ndarray, edits: Mapping[int, Edit], rules: Rules, top: TopLogits) -> _Layout:
    """Lay out rows whose logits are changed. A token is certain to be among the first if it still exceeds, after
    its change, the least of the K largest: no other token can, unless it is raised."""
    width = top.ids.shape[1]
    raw = top.logits[rows].astype(np.float64)
    power = _power(rules.temperature[rows])
    low, high = _tail_bounds(raw, top.logsumexp[rows].astype(np.float64), top.vocab_size, power)
    ids, mass, known = np.zeros(raw.shape, np.int64), np.zeros(raw.shape), np.zeros(len(rows), np.int64)
    outside = top.vocab_size - width
    for at, row in enumerate(rows.tolist()):
        edit, row_ids = edits[row], top.ids[row].astype(np.int64)
        if outside and edit.may_raise_others(row_ids):
            continue
        changed = edit.apply(raw[at], row_ids)
        order = np.lexsort((row_ids, -changed))
        ids[at] = row_ids[order]
        least = raw[at, -1] if outside else -np.inf
        known[at] = np.count_nonzero(changed > least)
        laid = np.exp((changed[order] - raw[at, 0]) * power[at])
        beyond = laid[known[at] :].sum()
        laid[known[at] :] = 0
        mass[at] = laid
        lowered = edit.num_lowered_others(row_ids)
        lowered = outside if lowered is None else min(lowered, outside)
        lost = lowered * math.exp((raw[at, -1] - raw[at, 0]) * power[at])
        low[at], high[at] = max(low[at] - lost, 0.0) + beyond, high[at] + beyond
    return _Layout(ids, mass, known, low, high)


def _decide(rows: np.ndarray, layout: _Layout, rules: Rules, draws: np.ndarray, tokens: np.ndarray) -> None:
    """Write the tokens of those `rows` that their layout decides."""
    whole = len(rows) == len(draws)
    picked = _pick(layout, rules if whole else rules.take(rows), draws if whole else draws[rows])
    greedy = rules.temperature[rows] == 0
    if greedy.any():
        picked = np.where(greedy, np.where(layout.known > 0, 0, -1), picked)
    sure = picked >= 0
    tokens[rows[sure]] = layout.ids[np.flatnonzero(sure), picked[sure]]


def _from_full(rules: Rules, draw: np.ndarray, logits: np.ndarray) -> int:
    """Choose from a whole row of logits, sorting no more of it than it takes."""
    largest = logits.max()
    if largest == -np.inf:
        return NO_TOKEN
    if rules.all_greedy:
        return int(logits.argmax())
    mass = np.exp((logits - largest) / rules.temperature[0])
    total = mass.sum()
    count = min(int(rules.top_k[0]) or len(logits), len(logits))
    size = min(_FIRST_SORT, count)
    while True:
        order = _largest(logits, size)
        rest = np.array([max(total - mass[order].sum(), 0.0) if size < len(logits) else 0.0])
        layout = _Layout(order[None], mass[None, order], np.array([size]), rest, rest)
        picked = int(_pick(layout, rules, draw)[0])
        if picked >= 0:
            return int(order[picked])
        size = min(8 * size, count)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest values, falling; equal ones by rising index."""
    if count == len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _pick(layout: _Layout, rules: Rules, draws: np.ndarray) -> np.ndarray:
    """Return [N] which column each draw falls on, or −1 where the tail could change that.

    Top-k, top-p and min-p each cut the layout to a beginning, top-p after top-k.
    """
    mass, known = layout.mass, layout.known
    low, high = layout.low, layout.high
    everything = np.arange(len(known))
    if rules.top_k.any():
        cut = (rules.top_k > 0) & (rules.top_k <= known)
        known = np.where(cut, rules.top_k, known)
        low = np.where(rules.top_k > 0, 0.0, low)
        high = np.where(cut, 0.0, high)
    reach = np.cumsum(mass, axis=1)
    last = reach[everything, np.maximum(known, 1) - 1]
    if (known < mass.shape[1]).any():
        reach = np.minimum(reach, last[:, None])
    complete = high == 0
    nucleus = rules.top_p < 1
    has_nucleus, limited = bool(nucleus.any()), rules.min_p > 0
    likely = None
    if limited.any():
        inside = np.arange(mass.shape[1]) < known[:, None]
        likely = np.maximum(((mass >= (rules.min_p * mass[:, 0])[:, None]) & inside).sum(1), 1)
    # What is kept, and so what is picked, only grows with the tail: if both bounds pick the same, so does the truth.
    picks: list[np.ndarray] = []
    for is_low, tail in ((True, low), (False, high)):
        kept, rest, sure = known, tail, (known > 0) & (last > 0)
        if has_nucleus:
            edge = (reach < (rules.top_p * (last + tail))[:, None]).sum(1)
            edge = np.where(complete, np.minimum(edge, known - 1), edge)
            sure = sure & ~(nucleus & (edge >= known))
            kept = np.where(nucleus, np.minimum(edge + 1, known), known)
            rest = np.where(nucleus, 0.0, tail)
        if likely is not None:
            cut = limited & (likely < kept)
            kept = np.where(cut, likely, kept)
            # of the tail, all or nothing may be likely enough
            rest = np.where(cut | (limited if is_low else False), 0.0, rest)
        total = reach[everything, np.maximum(kept, 1) - 1] + rest
        pick = (reach <= (draws * total)[:, None]).sum(1)
        pick = np.where(rest == 0, np.minimum(pick, kept - 1), pick)  # rounding may put a draw next to 1 past the end
        picks.append(np.where(sure & (pick < known), pick, -1))
    return np.where(picks[0] == picks[1], picks[0], -1)


def _power(temperature: np.ndarray) -> np.ndarray:
    """Return 1/T; 1 for greedy rows, whose mass nobody looks at."""
    return 1 / np.where(temperature == 0, 1.0, temperature)


def _tail_bounds(
    logits: np.ndarray, logsumexp: np.ndarray, vocab_size: int, power: np.ndarray, mass: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bound Σ exp(r · (l − l_0)) over the tokens that are not among `logits`, per row; r = 1/T is `power`.

    Each l is at most the last of `logits`, and the sum at r = 1 is exp(logsumexp) − Σ_known exp(l). For n terms of
    known sum s, none above m, the sum of their r-th powers lies between n·(s/n)^r and s·m^(r−1): in this order for
    r ≥ 1, in the other for r ≤ 1 (power mean; x^r = x·x^(r−1)). f32 rounding of logsumexp widens s. `mass` is given
    where every r is 1: the terms of the known tokens; the bounds are then s itself.
    """
    count = vocab_size - logits.shape[1]
    if count <= 0:
        return np.zeros(len(logits)), np.zeros(len(logits))
    shifted = logits - logits[:, :1]
    total = np.exp(logsumexp - logits[:, 0])
    slack = total * (1e-5 + 5e-7 * np.abs(logsumexp))
    rest = total - (np.exp(shifted) if mass is None else mass).sum(1)
    if mass is not None:
        high = np.minimum(np.maximum(rest, 0) + slack, count * np.exp(shifted[:, -1]))
        return np.minimum(np.maximum(rest - slack, 0), high), high
    log_largest = np.maximum(shifted[:, -1], -1e30)
    bounds: list[np.ndarray] = []
    with np.errstate(divide="ignore"):
        for known in (np.maximum(rest - slack, 0), np.maximum(rest, 0) + slack):
            log_known = np.log(known)
            equal = count * np.exp(np.minimum(power * (log_known - math.log(count)), 700))
            steep = np.exp(np.minimum(log_known + (power - 1) * log_largest, 700))
            bounds += [np.minimum(equal, steep), np.maximum(equal, steep)]
    high = np.minimum(bounds[3], count * np.exp(power * log_largest))
    return np.minimum(bounds[0], high), high
