"""Which keys and experts each side chose, layer by layer, and how far the gaps of those that differ lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from seekforge.exporter.parity.compare.metrics import Flip, classify, different, expert_gaps, farthest, key_gaps
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import Dump

#: Score gaps that are noise although no noise was measured: sums in another order.
FLOOR_KEYS, FLOOR_EXPERTS = 1e-5, 2e-6
#: A choice is noise within this many times the measured difference of scores (spec §11: twice the largest error).
_FACTOR = 2.0
_KEEP_FLIPS = 100


@dataclass
class Choices:
    """What one layer's indexer or router chose, over all rows. Kinds and flips are there once it is settled.

    Attributes:
        rows: how many rows chose among more than they may take.
        other: how many of them chose another set.
        overlap: the sum of overlaps over `rows`.
        tolerance: the gap that counts as noise.
        kinds: kind -> how many keys or experts of the symmetric difference are of it.
        flips: the farthest of them, farthest first.
        curve: context length -> (sum of overlaps, rows).
        noise_rows: rows in which PyTorch differs from itself when embeddings change by parts in a million.
    """

    rows: int = 0
    other: int = 0
    overlap: float = 0.0
    tolerance: float = 0.0
    kinds: dict[str, int] = field(default_factory=lambda: {"tie": 0, "noise": 0, "wrong": 0, "unknown": 0})
    flips: list[Flip] = field(default_factory=list)
    curve: dict[int, tuple[float, int]] = field(default_factory=dict)
    noise_rows: int = 0
    _gaps: list[np.ndarray] = field(default_factory=list)

    def note(
        self, step: int, sequence: int, position: int, chosen: np.ndarray, num_judged: int, gaps: np.ndarray
    ) -> None:
        """Take the keys or experts of one row that one side alone chose, those of the judged side first."""
        self._gaps.append(gaps)
        for i, (choice, gap) in enumerate(zip(chosen.tolist(), gaps.tolist(), strict=True)):
            by = "judged" if i < num_judged else "reference"
            self.flips.append(Flip(step, sequence, position, choice, by, gap, "wrong"))
        if len(self.flips) > 2 * _KEEP_FLIPS:
            self.flips = farthest(self.flips, _KEEP_FLIPS)

    def settle(self) -> None:
        """Name every gap, by the tolerance that is known only when the noise of all steps was measured."""
        gaps = np.concatenate(self._gaps) if self._gaps else np.zeros(0)
        self._gaps = []
        ties, within = gaps == 0.0, gaps <= self.tolerance
        self.kinds["tie"] += int(ties.sum())
        self.kinds["noise"] += int((within & ~ties).sum())
        self.kinds["wrong"] += int((~within).sum())
        self.flips = [
            replace(flip, kind=classify(flip.gap, self.tolerance)) for flip in farthest(self.flips, _KEEP_FLIPS)
        ]


@dataclass(frozen=True)
class Sides:
    """The dumps of one comparison.

    Attributes:
        judged: the side in question.
        reference: what it is compared with.
        noise: PyTorch from embeddings changed by rounding noise; None where that was not measured.
        base: what the noise is compared with: the reference, or PyTorch where that is another engine.
        draws: more of the noise, logits alone.
    """

    judged: Dump
    reference: Dump
    noise: Dump | None
    base: Dump
    draws: Sequence[Dump] = ()


class Keys:
    """Scores and choices of one layer's indexer, case by case: cached keys are gathered as steps go by."""

    def __init__(self, sides: Sides, config: ModelConfig, layer: int, result: Choices) -> None:
        self.judged, self.reference, self.noise, self.base = sides.judged, sides.reference, sides.noise, sides.base
        self.layer, self.result, self.topk = layer, result, config.index_topk
        self.fp8 = bool(sides.reference.side.numerics.get("indexer_fp8", False))
        self._cached: dict[str, dict[int, np.ndarray]] = {}
        self._case = ""
        result.tolerance = FLOOR_KEYS

    def add(self, number: int) -> None:
        """Take the next step."""
        name = f"topk_indices.{self.layer}"
        if not (self.judged.has(number, name) and self.reference.has(number, name)):
            return
        case, step = self.reference.cases[number]
        if case.name != self._case:
            self._case, self._cached = case.name, {}
        places = step.places()
        for label, dump in (("reference", self.reference), ("base", self.base), ("noise", self.noise)):
            if dump is not None and dump.has(number, f"index_k.{self.layer}"):
                self._append(label, places, dump.rows(number, f"index_k.{self.layer}"))
        judged, reference = self.judged.rows(number, name), self.reference.rows(number, name)
        selecting = [i for i, (_, position) in enumerate(places) if position + 1 > self.topk]
        if self.noise is not None and self.noise.has(number, name):
            other = self.noise.rows(number, name)
            self.result.noise_rows += int((other != self.base.rows(number, name)).any(-1).sum())
            self._measure(number, places, selecting)
        for i, (sequence, position) in enumerate(places):
            by_judged, by_reference = different(judged[i], reference[i])
            if position + 1 > self.topk:
                share = 1.0 - len(by_reference) / self.topk
                self.result.rows += 1
                self.result.overlap += share
                total, count = self.result.curve.get(position + 1, (0.0, 0))
                self.result.curve[position + 1] = (total + share, count + 1)
            if len(by_judged) + len(by_reference):
                self.result.other += 1
                self._flips(number, i, sequence, position, by_judged, by_reference, reference[i])

    def _append(self, label: str, places: Sequence[tuple[int, int]], rows: np.ndarray) -> None:
        cached = self._cached.setdefault(label, {})
        rows = _fake_quantize(rows) if self.fp8 else rows
        for sequence in dict.fromkeys(sequence for sequence, _ in places):
            chosen = [i for i, (s, _) in enumerate(places) if s == sequence]
            before = cached.get(sequence)
            cached[sequence] = rows[chosen] if before is None else np.concatenate([before, rows[chosen]])

    def _scores(self, label: str, dump: Dump, number: int, row: int, sequence: int, position: int) -> np.ndarray | None:
        names = [f"index_q.{self.layer}", f"index_w.{self.layer}"]
        keys = self._cached.get(label, {}).get(sequence)
        if keys is None or not dump.has(number, *names) or len(keys) <= position:
            return None
        q, w = dump.rows(number, names[0])[row], dump.rows(number, names[1])[row]
        q = _fake_quantize(q) if self.fp8 else q
        return w @ np.maximum(q @ keys[: position + 1].T, 0.0)

    def _measure(self, number: int, places: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
        """Take the largest difference of scores between the two runs of PyTorch, on some rows, into the tolerance."""
        assert self.noise is not None
        for i in list(rows)[:: max(1, len(rows) // 8)]:
            first = self._scores("base", self.base, number, i, *places[i])
            second = self._scores("noise", self.noise, number, i, *places[i])
            if first is not None and second is not None:
                spread = float(first.max() - first.min()) or 1.0
                moved = float(np.abs(first - second).max()) / spread
                self.result.tolerance = max(self.result.tolerance, _FACTOR * moved)

    def _flips(
        self,
        number: int,
        row: int,
        sequence: int,
        position: int,
        by_judged: np.ndarray,
        by_reference: np.ndarray,
        reference: np.ndarray,
    ) -> None:
        scores = self._scores("reference", self.reference, number, row, sequence, position)
        keys = np.concatenate([by_judged, by_reference])
        if scores is None:
            self.result.kinds["unknown"] += len(keys)
            return
        gaps = key_gaps(scores, reference, keys)
        self.result.note(number, sequence, position, keys, len(by_judged), gaps)


def _fake_quantize(x: np.ndarray) -> np.ndarray:
    """Round as the indexer does in FP8, in blocks of 128, and back."""
    import torch

    from seekforge.plugins.quant import fake_quantize

    return fake_quantize(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def add_experts(sides: Sides, config: ModelConfig, number: int, layer: int, result: Choices) -> None:
    """Count the experts that one layer chose in a step."""
    judged, reference, noise, base = sides.judged, sides.reference, sides.noise, sides.base
    name, scores_name = f"expert_ids.{layer}", f"biased_scores.{layer}"
    if not (judged.has(number, name) and reference.has(number, name)):
        return
    chosen, expected = judged.rows(number, name), reference.rows(number, name)
    result.tolerance = max(result.tolerance, FLOOR_EXPERTS)
    # an engine does not show its biases: where it is the reference, those of PyTorch beside it serve
    scored = next((dump for dump in (reference, base) if dump.has(number, scores_name)), None)
    scores = None if scored is None else scored.rows(number, scores_name)
    if noise is not None and noise.has(number, name, scores_name) and base.has(number, name, scores_name):
        moved = np.abs(noise.rows(number, scores_name) - base.rows(number, scores_name))
        result.tolerance = max(result.tolerance, _FACTOR * float(moved.max(initial=0.0)))
        pair = np.sort(noise.rows(number, name), -1), np.sort(base.rows(number, name), -1)
        result.noise_rows += int((pair[0] != pair[1]).any(-1).sum())
    for i, (sequence, position) in enumerate(reference.cases[number][1].places()):
        by_judged, by_reference = different(chosen[i], expected[i])
        result.rows += 1
        result.overlap += 1.0 - len(by_reference) / expected.shape[1]
        if len(by_judged) + len(by_reference) == 0:
            continue
        result.other += 1
        experts = np.concatenate([by_judged, by_reference])
        if scores is None:
            result.kinds["unknown"] += len(experts)
            continue
        gaps = expert_gaps(scores[i], expected[i], experts, config.n_group, config.topk_group)
        result.note(number, sequence, position, experts, len(by_judged), gaps)
