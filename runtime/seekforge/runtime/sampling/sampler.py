"""Chooses the next token of each row, exactly as sampling from the whole vocabulary would. numpy only.

A step returns the K largest logits of a row and the logsumexp of all. One uniform draw picks from the row's layout
(`layout`), so the first few tokens decide whenever the draw, and the edge of the nucleus, fall inside them. The mass
of the rest is known exactly at temperature 1 and between bounds at others; only if the bounds disagree is more looked
at: first all K, then the row's whole vocabulary. Each way chooses the same token.

The draw of token n is a pure function of (seed, n): a request gives the same tokens in any batch, again after it
was interrupted, and with speculation or without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from seekforge.formats.step_runner import StepOutputs
from seekforge.runtime.sampling.inverse_cdf import Layout, SamplingMetadata, first_true, pick, tail_bounds
from seekforge.runtime.sampling.logits_processors import Edits
from seekforge.runtime.sampling.params import SamplingParams

#: How many of the K largest are looked at first: enough for most rows, and little work.
_FIRST_COLUMNS = 64
#: Up to so many values all K are looked at at once: calls then cost more than values.
_FEW_VALUES = 1024
#: How many tokens of a whole row are sorted first; eight times as many if they do not decide.
_FIRST_SORT = 4096
#: What is left of a tail that is empty but for rounding: not nothing.
_SOME_MASS = 1e-300
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
class FullLogits:
    """The whole logits of N rows, which stay where they are until one is needed.

    Attributes:
        fetch: gives those of all rows of the step, [L, vocab_size] f32; may be called often.
        places: [N], which of them.
    """

    fetch: Callable[[], np.ndarray]
    places: np.ndarray

    def take(self, rows: np.ndarray) -> FullLogits:
        """Return some of the rows."""
        return FullLogits(self.fetch, self.places[rows])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return some rows whole, [M, vocab_size] f32."""
        return self.fetch()[self.places[rows]]

    def values(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits of the tokens `ids`, [N, C], of each row."""
        return self.fetch()[self.places[:, None], ids]


def needs_full_logits(params: SamplingParams) -> bool:
    """Whether a row may have to look at its whole vocabulary, so that the step must keep it."""
    return not params.greedy or params.edits_logits or params.logprobs is not None or params.best_of is not None


def choose(
    rules: SamplingMetadata, index: np.ndarray, edits: Edits | None, top: TopLogits, full: FullLogits
) -> np.ndarray:
    """Choose one token per row.

    Args:
        rules: the sampling rules of N rows.
        index: [N], which token of its completion each row chooses.
        edits: the changes of those rows; None changes nothing.
        top: the top K logits of those rows.
        full: all logits of those rows; fetched for those that need them.

    Returns:
        [N] token ids, int64; `NO_TOKEN` where nothing may be chosen.
    """
    if rules.all_greedy and edits is None:
        return top.ids[:, 0].astype(np.int64)
    draws = rules.draws(index)
    count, width = top.ids.shape
    first = width if count * width <= _FEW_VALUES else min(_FIRST_COLUMNS, width)
    tokens = _from_top(first, rules, draws, edits, top, full)
    if first < width:
        left = np.flatnonzero(tokens == NO_TOKEN)
        if len(left):
            changes = None if edits is None else edits.take(left)
            some = (rules.take(left), draws[left], changes, top.take(left), full.take(left))
            tokens[left] = _from_top(width, *some)
    left = np.flatnonzero(tokens == NO_TOKEN)
    for row, logits in zip(left.tolist(), full.rows(left) if len(left) else ()):
        values, one = logits.astype(np.float64), np.array([row])
        if edits is not None:
            values = edits.take(one).apply(values[None], np.arange(len(values))[None])[0]
        tokens[row] = _from_full(rules.take(one), draws[one], values)
    return tokens


def _from_top(
    columns: int, rules: SamplingMetadata, draws: np.ndarray, edits: Edits | None, top: TopLogits, full: FullLogits
) -> np.ndarray:
    """Choose from the first columns; `NO_TOKEN` where they do not decide."""
    ids, logits = top.ids[:, :columns], top.logits[:, :columns]
    first = logits[:, 0].astype(np.float64)
    shifted = logits - first[:, None]
    mass = np.exp(shifted if rules.unscaled else shifted * rules.power[:, None])
    tail = tail_bounds(shifted, first, top.logsumexp, top.vocab_size - columns, rules, mass)
    layout = Layout(ids, mass, None, tail)
    if edits is not None:
        layout = _edited(layout, logits.astype(np.float64), edits, rules, top.vocab_size - columns, full)
    picked = pick(layout, rules, draws)
    tokens = layout.ids[np.arange(len(picked)), picked].astype(np.int64)
    return np.where(picked >= 0, tokens, NO_TOKEN)


def _edited(
    layout: Layout, logits: np.ndarray, edits: Edits, rules: SamplingMetadata, num_others: int, full: FullLogits
) -> Layout:
    """Lay out anew rows of which some change their logits.

    A token is certain to be among the first if it still exceeds, after its change, the least of the known: no other
    can, unless it is raised. Those that a bias raises are looked up; where a penalty may raise one, nothing is known.

    Args:
        layout: the layout without the changes.
        logits: [N, C], f64, of its tokens.
        edits: the changes of those rows.
        rules: the sampling rules of those rows.
        num_others: tokens that are not known.
        full: all logits of those rows.
    """
    ids, tail = layout.ids.astype(np.int64), layout.tail
    width = ids.shape[1]
    first, least = logits[:, :1], logits[:, -1:]
    changed = edits.apply(logits, ids)
    touched = (changed != logits).any(1)
    unsure = edits.may_raise_others(ids) if num_others else np.zeros(len(ids), bool)
    num_lowered = (changed < logits).sum(1)
    if edits.favored is not None and num_others:
        raw = _others(edits.favored, ids, full)
        is_finite = raw > -np.inf
        raised = np.where(is_finite, edits.apply(raw, edits.favored), -np.inf)
        ids, changed = np.concatenate([ids, edits.favored], axis=1), np.concatenate([changed, raised], axis=1)
        touched |= is_finite.any(1)
        gone = np.exp((raw - first) * rules.power[:, None]).sum(1)  # they are part of the tail no more
        tail = np.maximum(tail - gone, [[0.0], [_SOME_MASS]])
    ids, changed = _in_order(ids, changed)
    largest = np.maximum(first, changed[:, :1])
    mass = np.exp((changed - largest) * rules.power[:, None])
    known = np.where(touched, first_true(changed <= least) if num_others else (changed > -np.inf).sum(1), width)
    inside = np.arange(ids.shape[1]) < known[:, None]
    beyond = np.where(inside, 0.0, mass).sum(1)
    lost = edits.num_lowered_others(num_lowered, num_others) * np.exp((least - first)[:, 0] * rules.power)
    tail = np.maximum(tail - np.stack([lost, np.zeros_like(lost)]), 0.0)
    tail = tail * np.exp((first - largest)[:, 0] * rules.power) + beyond
    return Layout(ids, np.where(inside, mass, 0.0), np.where(unsure, 0, known), tail)


def _others(tokens: np.ndarray, ids: np.ndarray, full: FullLogits) -> np.ndarray:
    """Return the logits of `tokens`, [N, X], f64; −inf for those that are among `ids`, and for −1."""
    known = (tokens[:, :, None] == ids[:, None, :]).any(2) | (tokens < 0)
    if known.all():
        return np.full(tokens.shape, -np.inf)
    return np.where(known, -np.inf, full.values(np.maximum(tokens, 0)).astype(np.float64))


def _in_order(ids: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both, each row by falling logit and equal ones by rising id."""
    order = np.argsort(-logits, axis=1, kind="stable")
    ids, logits = np.take_along_axis(ids, order, 1), np.take_along_axis(logits, order, 1)
    swapped = (logits[:, 1:] == logits[:, :-1]) & (ids[:, 1:] < ids[:, :-1]) & (logits[:, 1:] > -np.inf)
    rows = np.flatnonzero(swapped.any(1))
    if len(rows):
        order = np.lexsort((ids[rows], -logits[rows]), axis=1)
        ids[rows], logits[rows] = np.take_along_axis(ids[rows], order, 1), np.take_along_axis(logits[rows], order, 1)
    return ids, logits


def _from_full(rules: SamplingMetadata, draw: np.ndarray, logits: np.ndarray) -> int:
    """Choose from a whole row of logits, sorting no more of it than it takes."""
    largest = logits.max()
    if largest == -np.inf:
        return NO_TOKEN
    if rules.temperature[0] == 0:
        return int(logits.argmax())
    mass = np.exp((logits - largest) / rules.temperature[0])
    total = mass.sum()
    count = min(int(rules.top_k[0]) or len(logits), len(logits))
    size = min(_FIRST_SORT, count)
    while True:
        order = _largest(logits, size)
        rest = max(total - mass[order].sum(), 0.0) if size < len(logits) else 0.0
        layout = Layout(order[None], mass[None, order], None, np.full((2, 1), rest))
        picked = int(pick(layout, rules, draw)[0])
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
