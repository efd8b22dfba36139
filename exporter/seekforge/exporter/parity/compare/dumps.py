"""Two dumps side by side: hidden states, caches, logits, and which keys and experts each side chose.

A pure reading of two (or, with measured noise, three) dumps; which side ran where does not matter. It says how far the
sides are apart. Why, and whether that is a fault, is for `operations` and `gates`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from seekforge.common.errors import ConfigError
from seekforge.exporter.parity.compare.metrics import (
    Difference,
    compare_logits,
    row_errors,
)
from seekforge.exporter.parity.compare.selections import Choices, Keys, Sides, add_experts
from seekforge.exporter.program.taps import layer_points
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import INDEX, Dump
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.step_io import INTERMEDIATE_TENSORS


@dataclass
class LayerComparison:
    """One layer.

    Attributes:
        layer: its absolute number.
        graph: model or mtp.
        points: tap -> difference.
        caches: kind of cache -> difference.
        stream: the difference of the residual stream behind it.
        noise: that of PyTorch and PyTorch from embeddings changed by rounding noise.
        keys: which keys were chosen.
        experts: which experts were chosen; None in a dense layer.
    """

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
        name: what reports call it.
        mode: how its sequences are cut.
        context: tokens of its longest sequence.
        graph: model or mtp.
        rows: (sequence, position) of each row.
        heat_layers: the layers that both sides show.
        heat: [layers, rows] error of the residual stream in parts of its root mean square.
        logits: the difference of all rows with logits together.
        logit_rows: which of the rows have logits.
        error: the difference of each of those, as `metrics.LogitRows` has it; `kl`, `top1`, `top10`, `nll` and
            `nll_reference` too.
        noise_error: PyTorch against itself, the same rows; empty without noise.
        drawn_error: the same in all draws of the noise, one after the other; `drawn_kl` and `drawn_top1` too.
        flipped: [rows] bool, whether any layer chose otherwise.
    """

    name: str
    mode: str
    context: int
    graph: str
    rows: list[tuple[int, int]]
    heat_layers: list[int]
    heat: np.ndarray
    logits: Difference
    logit_rows: np.ndarray
    error: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top10: np.ndarray
    nll: np.ndarray
    nll_reference: np.ndarray
    noise_error: np.ndarray
    drawn_error: np.ndarray
    drawn_kl: np.ndarray
    drawn_top1: np.ndarray
    flipped: np.ndarray


@dataclass
class Comparison:
    """Everything that two dumps say.

    Attributes:
        layers: each layer, in the order of data.
        cases: each case, the model's rows and the MTP module's apart.
        not_finite: how many values are NaN or inf on one side only.
        has_noise: whether PyTorch was compared with itself too.
    """

    layers: list[LayerComparison]
    cases: list[CaseComparison]
    not_finite: int
    has_noise: bool


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
    check_pair(judged, reference)
    perturbed, base = noise if isinstance(noise, tuple) else (noise, reference)
    sides = Sides(judged, reference, perturbed, base, () if perturbed is None else more_draws(perturbed))
    config = ModelConfig.parse(reference.side.config, str(reference.folder))
    layers = [_compare_layer(sides, config, graph, layer) for graph, layer in _layers(reference)]
    cases = [
        _compare_case(sides, name, graph)
        for name, graph in dict.fromkeys((case.name, step.graph) for case, step in reference.cases)
    ]
    not_finite = sum(d.not_finite for layer in layers for d in layer.points.values())
    not_finite += sum(int((~np.isfinite(case.error)).sum()) for case in cases)
    return Comparison(layers, cases, not_finite, noise is not None)


def draw_folder(noise: Path, draw: int) -> Path:
    """Return the folder of one draw of the noise: the others stand beside the first."""
    return noise if draw == 0 else noise.with_name(f"{noise.name}.{draw}")


def more_draws(noise: Dump) -> list[Dump]:
    """Open the draws beside the first."""
    draws: list[Dump] = []
    while (draw_folder(noise.folder, len(draws) + 1) / INDEX).is_file():
        draws.append(Dump.open(draw_folder(noise.folder, len(draws) + 1)))
    return draws


def check_pair(judged: Dump, reference: Dump) -> None:
    """Refuse dumps that cannot be compared.

    Raises:
        ConfigError: they are of other plans or models.
    """
    if judged.plan != reference.plan:
        raise ConfigError(
            f"{judged.folder} and {reference.folder} ran different steps; make the second dump with the plan of the "
            "first (seekforge dump --plan, or parity --from-dump FIRST --checkpoint …)"
        )
    check_comparable(judged.side.config, reference.side.config, (str(judged.folder), str(reference.folder)))


def check_comparable(judged: Mapping[str, object], reference: Mapping[str, object], names: tuple[str, str]) -> None:
    """Refuse configs of models whose tensors do not belong together.

    Args:
        judged: config.json of the one side.
        reference: config.json of the other.
        names: what to call the two.

    Raises:
        ConfigError: naming the first key that differs.
    """
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "index_topk", "n_routed_experts"):
        if judged.get(key) != reference.get(key):
            values = judged.get(key), reference.get(key)
            raise ConfigError(f"{names[0]} has {key} {values[0]}, {names[1]} has {values[1]}: other models")


def _layers(dump: Dump) -> list[tuple[str, int]]:
    """Return (graph, layer) of every layer, in the order of data."""
    start, stop = dump.side.layers
    result = [("model", layer) for layer in range(start, stop)]
    number = int(dump.side.config["num_hidden_layers"])
    if stop == number and any(step.graph == "mtp" for _, step in dump.cases):
        result.append(("mtp", number))
    return result


def _steps(dump: Dump, graph: str) -> list[int]:
    return [number for number, (_, step) in enumerate(dump.cases) if step.graph == graph]


# --- layers -------------------------------------------------------------------------------------------------


def _compare_layer(sides: Sides, config: ModelConfig, graph: str, layer: int) -> LayerComparison:
    judged, reference = sides.judged, sides.reference
    result = LayerComparison(layer, graph)
    if config.is_moe_layer(layer):
        result.experts = Choices()
    keys = Keys(sides, config, layer, result.keys)
    for number in _steps(reference, graph):
        for point in layer_points(config, layer):
            name = f"{point}.{layer}"
            if judged.has(number, name) and reference.has(number, name):
                pair = judged.rows(number, name), reference.rows(number, name)
                result.points.setdefault(point, Difference()).add(*pair)
        actual, expected = (stream_rows(dump, number, layer + 1) for dump in (judged, reference))
        if actual is not None and expected is not None:
            result.stream = result.stream or Difference()
            result.stream.add(actual, expected)
        if sides.noise is not None:
            actual, expected = (stream_rows(dump, number, layer + 1) for dump in (sides.noise, sides.base))
            if actual is not None and expected is not None:
                result.noise = result.noise or Difference()
                result.noise.add(actual, expected)
        for kind in ("latent", "index"):
            name = f"cache_{kind}.{layer}"
            if judged.has(number, name) and reference.has(number, name):
                actual, expected = judged.tensor(number, name), reference.tensor(number, name)
                if actual.shape == expected.shape:
                    result.caches.setdefault(kind, Difference()).add(actual[BLOCK_SIZE:], expected[BLOCK_SIZE:])
        keys.add(number)
        if result.experts is not None:
            add_experts(sides, config, number, layer, result.experts)
    result.keys.settle()
    if result.experts is not None:
        result.experts.settle()
    return result


def stream_rows(dump: Dump, number: int, layer: int) -> np.ndarray | None:
    """Return the residual stream that goes into `layer`: [rows, H] f32, or None where the dump does not show it."""
    names = [f"{name}.{layer}" for name in INTERMEDIATE_TENSORS]
    if not dump.has(number, *names):
        return None
    first, second = (dump.rows(number, name) for name in names)
    return first + second


# --- cases --------------------------------------------------------------------------------------------------


def _compare_case(sides: Sides, name: str, graph: str) -> CaseComparison:
    judged, reference, noise, base = sides.judged, sides.reference, sides.noise, sides.base
    numbers = [n for n, (case, step) in enumerate(reference.cases) if case.name == name and step.graph == graph]
    case = reference.cases[numbers[0]][0]
    texts = _texts(reference, numbers)
    rows = [place for number in numbers for place in reference.cases[number][1].places()]
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
    columns: dict[str, list[np.ndarray]] = {}
    logits, offset = Difference(), 0
    for number in numbers:
        arrays = reference.arrays(number)
        places = reference.cases[number][1].places()
        if judged.has(number, "logits") and reference.has(number, "logits"):
            index = np.array([int(arrays.real[:row].sum()) for row in arrays.logits_index])
            following = np.array([texts.get((places[i][0], places[i][1] + 1), -1) for i in index])
            pair = judged.tensor(number, "logits"), reference.tensor(number, "logits")
            logits.add(*pair)
            result = compare_logits(*pair, following)
            values = {**result.__dict__, "logit_rows": index + offset}
            if noise is not None and noise.has(number, "logits") and base.has(number, "logits"):
                unchanged = base.tensor(number, "logits")
                changed = [dump.tensor(number, "logits") for dump in (noise, *sides.draws)]
                draws = [compare_logits(one, unchanged, following) for one in changed]
                values |= {"noise_error": draws[0].error}
                for key in ("error", "kl", "top1"):
                    values[f"drawn_{key}"] = np.concatenate([getattr(draw, key) for draw in draws])
            for key, value in values.items():
                columns.setdefault(key, []).append(value)
        offset += len(places)
    empty = np.zeros(0)
    merged = {key: np.concatenate(parts) for key, parts in columns.items()}
    keys = (
        "error",
        "kl",
        "top1",
        "top10",
        "nll",
        "nll_reference",
        "noise_error",
        "drawn_error",
        "drawn_kl",
        "drawn_top1",
    )
    return CaseComparison(
        name=name,
        mode=case.mode,
        context=case.context,
        graph=graph,
        rows=rows,
        heat_layers=heat_layers,
        heat=heat,
        logits=logits,
        logit_rows=merged.get("logit_rows", np.zeros(0, int)),
        flipped=flipped,
        **{key: merged.get(key, empty) for key in keys},
    )


def _texts(dump: Dump, numbers: Sequence[int]) -> dict[tuple[int, int], int]:
    """Return (sequence, position) -> token over steps of one graph."""
    result = {}
    for number in numbers:
        _, step = dump.cases[number]
        tokens = [token for new in step.tokens for token in new]
        result |= dict(zip(step.places(), tokens, strict=True))
    return result


def _flipped(judged: Dump, reference: Dump, number: int) -> np.ndarray:
    """Return [rows] bool of a step: whether any layer chose other keys or experts."""
    result = np.zeros(int(reference.arrays(number).real.sum()), bool)
    for name in _selections(reference, number):
        if judged.has(number, name):
            pair = np.sort(judged.rows(number, name), -1), np.sort(reference.rows(number, name), -1)
            result |= (pair[0] != pair[1]).any(-1)
    return result


def _selections(dump: Dump, number: int) -> Iterator[str]:
    return (name for name in dump.names(number) if name.startswith(("topk_indices.", "expert_ids.")))
