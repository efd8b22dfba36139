"""Two dumps side by side: hidden states, caches, logits, and which keys and experts each side chose.

A pure reading of two (or, with measured noise, three) dumps; which side ran where does not matter. It says how far the
sides are apart. Why, and whether that is a fault, is for `local` and `verdict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from seekforge.exporter.parity.metrics import (
    Difference,
    Flip,
    classify,
    compare_logits,
    different,
    expert_gaps,
    key_gaps,
    row_errors,
)
from seekforge.exporter.parity.taps import HANDOVER, layer_points
from seekforge.plugins.errors import ConfigError
from seekforge.plugins.formats.dump import Dump
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.program import BLOCK_SIZE

#: Score gaps that are noise although no noise was measured: sums in another order.
FLOOR_KEYS, FLOOR_EXPERTS = 1e-5, 2e-6
#: A choice is noise within this many times the measured difference of scores (spec §11: twice the largest error).
_FACTOR = 2.0
_KEEP_FLIPS = 100


@dataclass
class Choices:
    """What one layer's indexer or router chose, over all rows.

    Attributes:
        rows: rows that chose among more than they may take. other: rows whose sets differ.
        overlap: sum of overlaps over `rows`. tolerance: gap that counts as noise.
        kinds: keys or experts of the symmetric difference by kind. flips: some of them.
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


@dataclass
class LayerComparison:
    """One layer. `points`: tap -> difference. `stream`: residual stream behind it; `noise`: of PyTorch itself."""

    layer: int
    graph: str
    points: dict[str, Difference] = field(default_factory=dict)
    caches: dict[str, Difference] = field(default_factory=dict)
    stream: Difference | None = None
    noise: Difference | None = None
    keys: Choices = field(default_factory=Choices)
    experts: Choices | None = None


@dataclass
class CaseComparison:
    """One case: rows in the order of (step, sequence, position), the model graph's and the MTP graph's.

    Attributes:
        graph, rows: which rows; (sequence, position) of each.
        heat: [layers, rows] error of the residual stream in parts of its root mean square.
        error, kl, top1, top10, nll, nll_reference: of the rows with logits, at `logit_rows`.
        noise_error, noise_kl, noise_top1: PyTorch against itself, the same rows; empty without noise.
        flipped: rows in which any layer chose otherwise.
    """

    name: str
    mode: str
    context: int
    graph: str
    rows: list[tuple[int, int]]
    heat_layers: list[int]
    heat: np.ndarray
    logit_rows: np.ndarray
    error: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top10: np.ndarray
    nll: np.ndarray
    nll_reference: np.ndarray
    noise_error: np.ndarray
    noise_kl: np.ndarray
    noise_top1: np.ndarray
    flipped: np.ndarray


@dataclass
class Comparison:
    """Everything that two dumps say."""

    layers: list[LayerComparison]
    cases: list[CaseComparison]
    not_finite: int
    has_noise: bool


@dataclass(frozen=True)
class _Sides:
    """The dumps. `noise` is to be compared with `base`: the reference, or PyTorch where that is another engine."""

    judged: Dump
    reference: Dump
    noise: Dump | None
    base: Dump


def compare(judged: Dump, reference: Dump, noise: Dump | tuple[Dump, Dump] | None = None) -> Comparison:
    """Compare two dumps of one plan.

    Args:
        judged: the side in question.
        reference: what it is compared with.
        noise: the reference with its embeddings changed by parts in a million; a pair (perturbed, unperturbed)
            where the reference is another engine and noise was measured in PyTorch.

    Raises:
        ConfigError: the dumps are of other plans or models.
    """
    _check_pair(judged, reference)
    perturbed, base = noise if isinstance(noise, tuple) else (noise, reference)
    sides = _Sides(judged, reference, perturbed, base)
    config = ModelConfig.parse(reference.side.config, str(reference.folder))
    layers = [_compare_layer(sides, config, graph, layer) for graph, layer in _layers(reference)]
    cases = [
        _compare_case(sides, name, graph)
        for name, graph in dict.fromkeys((case.name, step.graph) for case, step in reference.cases)
    ]
    not_finite = sum(d.not_finite for layer in layers for d in layer.points.values())
    not_finite += sum(int((~np.isfinite(case.error)).sum()) for case in cases)
    return Comparison(layers, cases, not_finite, noise is not None)


def _check_pair(judged: Dump, reference: Dump) -> None:
    if judged.plan != reference.plan:
        raise ConfigError(
            f"{judged.folder} and {reference.folder} ran different steps; make the second dump with the plan of the "
            "first (seekforge dump --plan, or parity --from-dump FIRST --checkpoint …)"
        )
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "index_topk", "n_routed_experts"):
        ours, theirs = judged.side.config.get(key), reference.side.config.get(key)
        if ours != theirs:
            raise ConfigError(f"{judged.folder} has {key} {ours}, {reference.folder} has {theirs}: other models")


def _layers(dump: Dump) -> list[tuple[str, int]]:
    """(graph, layer) in the order of data."""
    start, stop = dump.side.layers
    result = [("model", layer) for layer in range(start, stop)]
    number = int(dump.side.config["num_hidden_layers"])
    if stop == number and any(step.graph == "mtp" for _, step in dump.cases):
        result.append(("mtp", number))
    return result


def _steps(dump: Dump, graph: str) -> list[int]:
    return [number for number, (_, step) in enumerate(dump.cases) if step.graph == graph]


def _places(dump: Dump, number: int) -> list[tuple[int, int]]:
    _, step = dump.cases[number]
    return [
        (sequence, start + i)
        for sequence, start, new in zip(step.sequences, step.starts, step.tokens, strict=True)
        for i in range(len(new))
    ]


# --- layers -------------------------------------------------------------------------------------------------


def _compare_layer(sides: _Sides, config: ModelConfig, graph: str, layer: int) -> LayerComparison:
    judged, reference = sides.judged, sides.reference
    result = LayerComparison(layer, graph)
    if config.is_moe_layer(layer):
        result.experts = Choices()
    keys = _Keys(sides, config, layer, result.keys)
    for number in _steps(reference, graph):
        for point in layer_points(config, layer):
            name = f"{point}.{layer}"
            if judged.has(number, name) and reference.has(number, name):
                pair = judged.rows(number, name), reference.rows(number, name)
                result.points.setdefault(point, Difference()).add(*pair)
        ours, theirs = stream_rows(judged, number, layer + 1), stream_rows(reference, number, layer + 1)
        if ours is not None and theirs is not None:
            result.stream = result.stream or Difference()
            result.stream.add(ours, theirs)
        if sides.noise is not None:
            ours, theirs = (stream_rows(dump, number, layer + 1) for dump in (sides.noise, sides.base))
            if ours is not None and theirs is not None:
                result.noise = result.noise or Difference()
                result.noise.add(ours, theirs)
        for kind in ("latent", "index"):
            name = f"cache_{kind}.{layer}"
            if judged.has(number, name) and reference.has(number, name):
                ours, theirs = judged.tensor(number, name), reference.tensor(number, name)
                if ours.shape == theirs.shape:
                    result.caches.setdefault(kind, Difference()).add(ours[BLOCK_SIZE:], theirs[BLOCK_SIZE:])
        keys.add(number)
        if result.experts is not None:
            _add_experts(sides, config, number, layer, result.experts)
    return result


def stream_rows(dump: Dump, number: int, layer: int) -> np.ndarray | None:
    """Return the residual stream that goes into `layer`: [rows, H] f32, or None where the dump does not show it."""
    names = [f"{name}.{layer}" for name in HANDOVER]
    if not dump.has(number, *names):
        return None
    first, second = (dump.rows(number, name) for name in names)
    return first + second


class _Keys:
    """Scores and choices of one layer's indexer, case by case: cached keys are gathered as steps go by."""

    def __init__(self, sides: _Sides, config: ModelConfig, layer: int, result: Choices) -> None:
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
        case, _ = self.reference.cases[number]
        if case.name != self._case:
            self._case, self._cached = case.name, {}
        places = _places(self.reference, number)
        for label, dump in (("reference", self.reference), ("base", self.base), ("noise", self.noise)):
            if dump is not None and dump.has(number, f"index_k.{self.layer}"):
                self._append(label, places, dump.rows(number, f"index_k.{self.layer}"))
        ours, theirs = self.judged.rows(number, name), self.reference.rows(number, name)
        selecting = [i for i, (_, position) in enumerate(places) if position + 1 > self.topk]
        if self.noise is not None and self.noise.has(number, name):
            other = self.noise.rows(number, name)
            self.result.noise_rows += int((other != self.base.rows(number, name)).any(-1).sum())
            self._measure(number, places, selecting)
        for i, (sequence, position) in enumerate(places):
            mine, yours = different(ours[i], theirs[i])
            if position + 1 > self.topk:
                share = 1.0 - len(yours) / self.topk
                self.result.rows += 1
                self.result.overlap += share
                total, count = self.result.curve.get(position + 1, (0.0, 0))
                self.result.curve[position + 1] = (total + share, count + 1)
            if len(mine) + len(yours):
                self.result.other += 1
                self._flips(number, i, sequence, position, mine, yours, theirs[i])

    def _append(self, label: str, places: Sequence[tuple[int, int]], rows: np.ndarray) -> None:
        cached = self._cached.setdefault(label, {})
        rows = _fake_quantise(rows) if self.fp8 else rows
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
        q = _fake_quantise(q) if self.fp8 else q
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
        mine: np.ndarray,
        yours: np.ndarray,
        reference: np.ndarray,
    ) -> None:
        scores = self._scores("reference", self.reference, number, row, sequence, position)
        keys = np.concatenate([mine, yours])
        if scores is None:
            self.result.kinds["unknown"] += len(keys)
            return
        gaps = key_gaps(scores, reference, keys)
        _note(self.result, number, sequence, position, keys, len(mine), gaps)


def _fake_quantise(x: np.ndarray) -> np.ndarray:
    """The indexer's FP8 rounding, in blocks of 128."""
    import torch

    from seekforge.plugins.quant import fake_quantise

    return fake_quantise(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def _add_experts(sides: _Sides, config: ModelConfig, number: int, layer: int, result: Choices) -> None:
    judged, reference, noise, base = sides.judged, sides.reference, sides.noise, sides.base
    name, scores_name = f"expert_ids.{layer}", f"biased_scores.{layer}"
    if not (judged.has(number, name) and reference.has(number, name)):
        return
    ours, theirs = judged.rows(number, name), reference.rows(number, name)
    result.tolerance = max(result.tolerance, FLOOR_EXPERTS)
    # an engine does not show its biases: where it is the reference, those of PyTorch beside it serve
    scored = next((dump for dump in (reference, base) if dump.has(number, scores_name)), None)
    scores = None if scored is None else scored.rows(number, scores_name)
    if noise is not None and noise.has(number, name, scores_name) and base.has(number, name, scores_name):
        moved = np.abs(noise.rows(number, scores_name) - base.rows(number, scores_name))
        result.tolerance = max(result.tolerance, _FACTOR * float(moved.max(initial=0.0)))
        pair = np.sort(noise.rows(number, name), -1), np.sort(base.rows(number, name), -1)
        result.noise_rows += int((pair[0] != pair[1]).any(-1).sum())
    for i, (sequence, position) in enumerate(_places(reference, number)):
        mine, yours = different(ours[i], theirs[i])
        result.rows += 1
        result.overlap += 1.0 - len(yours) / theirs.shape[1]
        if len(mine) + len(yours) == 0:
            continue
        result.other += 1
        experts = np.concatenate([mine, yours])
        if scores is None:
            result.kinds["unknown"] += len(experts)
            continue
        gaps = expert_gaps(scores[i], theirs[i], experts, config.n_group, config.topk_group)
        _note(result, number, sequence, position, experts, len(mine), gaps)


def _note(
    result: Choices,
    number: int,
    sequence: int,
    position: int,
    chosen: np.ndarray,
    num_ours: int,
    gaps: np.ndarray,
) -> None:
    for i, (choice, gap) in enumerate(zip(chosen.tolist(), gaps.tolist(), strict=True)):
        kind = classify(gap, result.tolerance)
        result.kinds[kind] += 1
        if len(result.flips) < _KEEP_FLIPS:
            by = "judged" if i < num_ours else "reference"
            result.flips.append(Flip(number, sequence, position, choice, by, gap, kind))


# --- cases --------------------------------------------------------------------------------------------------


def _compare_case(sides: _Sides, name: str, graph: str) -> CaseComparison:
    judged, reference, noise, base = sides.judged, sides.reference, sides.noise, sides.base
    numbers = [n for n, (case, step) in enumerate(reference.cases) if case.name == name and step.graph == graph]
    case = reference.cases[numbers[0]][0]
    texts = _texts(reference, numbers)
    rows = [place for number in numbers for place in _places(reference, number)]
    layers = [layer for g, layer in _layers(reference) if g == graph]
    heat_layers = [
        layer for layer in layers if all(dump.has(numbers[0], f"residual.{layer + 1}") for dump in (judged, reference))
    ]
    heat = np.zeros((len(heat_layers), len(rows)), np.float32)
    for i, layer in enumerate(heat_layers):
        pairs = [(stream_rows(judged, n, layer + 1), stream_rows(reference, n, layer + 1)) for n in numbers]
        whole = [np.concatenate([p[side] for p in pairs]) for side in (0, 1)]  # pyright: ignore
        heat[i] = row_errors(whole[0], whole[1])
    flipped = np.concatenate([_flipped(judged, reference, number) for number in numbers])
    found: dict[str, list[np.ndarray]] = {}
    offset = 0
    for number in numbers:
        arrays = reference.arrays(number)
        places = _places(reference, number)
        if judged.has(number, "logits") and reference.has(number, "logits"):
            index = np.array([int(arrays.real[:row].sum()) for row in arrays.logits_index])
            following = np.array([texts.get((places[i][0], places[i][1] + 1), -1) for i in index])
            theirs = reference.tensor(number, "logits")
            result = compare_logits(judged.tensor(number, "logits"), theirs, following)
            values = {**result.__dict__, "logit_rows": index + offset}
            if noise is not None and noise.has(number, "logits") and base.has(number, "logits"):
                other = compare_logits(noise.tensor(number, "logits"), base.tensor(number, "logits"), following)
                values |= {"noise_error": other.error, "noise_kl": other.kl, "noise_top1": other.top1}
            for key, value in values.items():
                found.setdefault(key, []).append(value)
        offset += len(places)
    empty = np.zeros(0)
    merged = {key: np.concatenate(parts) for key, parts in found.items()}
    keys = ("error", "kl", "top1", "top10", "nll", "nll_reference", "noise_error", "noise_kl", "noise_top1")
    return CaseComparison(
        name=name,
        mode=case.mode,
        context=case.context,
        graph=graph,
        rows=rows,
        heat_layers=heat_layers,
        heat=heat,
        logit_rows=merged.get("logit_rows", np.zeros(0, int)),
        flipped=flipped,
        **{key: merged.get(key, empty) for key in keys},
    )


def _texts(dump: Dump, numbers: Sequence[int]) -> dict[tuple[int, int], int]:
    """(sequence, position) -> token, over steps of one graph."""
    result = {}
    for number in numbers:
        _, step = dump.cases[number]
        tokens = [token for new in step.tokens for token in new]
        result |= dict(zip(_places(dump, number), tokens, strict=True))
    return result


def _flipped(judged: Dump, reference: Dump, number: int) -> np.ndarray:
    """Rows of a step in which any layer chose other keys or experts."""
    result = np.zeros(int(reference.arrays(number).real.sum()), bool)
    for name in _selections(reference, number):
        if judged.has(number, name):
            pair = np.sort(judged.rows(number, name), -1), np.sort(reference.rows(number, name), -1)
            result |= (pair[0] != pair[1]).any(-1)
    return result


def _selections(dump: Dump, number: int) -> Iterator[str]:
    return (name for name in dump.names(number) if name.startswith(("topk_indices.", "expert_ids.")))
