"""The engine's layers on PyTorch's inputs: each layer of the engine is given what PyTorch had before it.

This is the other direction of `compare.operations`, where each operation of PyTorch is given what the engine had. It
also judges layers behind one whose output is useless (NaN, or so far off that nothing after it means anything), and
layers whose inside the engine does not show. What is allowed is what the same layer of PyTorch makes of its input when
that changes by parts in a million.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seekforge.exporter.parity.compare.dumps import stream_rows
from seekforge.exporter.parity.locate.bisect import spread
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.exporter.parity.torch_walks import NOISE, REFERENCE, Walker
from seekforge.exporter.program.taps import SELECTIONS, layer_points
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.dump import Dump
from seekforge.formats.step_io import INTERMEDIATE_TENSORS

Rows = Callable[[Dump, int], "np.ndarray | None"]


@dataclass(frozen=True)
class FedLayer:
    """One layer of the engine on PyTorch's inputs; the number behind the last layer is final norm and head.

    Attributes:
        layer: its absolute number.
        graph: model or mtp.
        error: how far most rows lie apart, as `bisect.Spread` has it.
        allowed: how far they may.
        bad: whether the error is beyond what is allowed.
        point: the first point inside beyond what is allowed, where the inside was looked at.
        detail: what is known beyond that, in words.
    """

    layer: int
    graph: str
    error: float
    allowed: float
    bad: bool
    point: str | None = None
    detail: str = ""


def judge_layers(judged: Dump, reference: Dump, nudged: Dump) -> list[FedLayer]:
    """Compare what the engine's layers made of PyTorch's inputs with what PyTorch made of them.

    Args:
        judged: what `EngineSide.dump_fed` wrote.
        reference: PyTorch's dump, which `judged` was fed with.
        nudged: each layer of PyTorch on inputs changed a little.
    """
    start, stop = judged.side.layers
    number = int(reference.side.config["num_hidden_layers"])
    result = []
    for layer in range(start, stop):
        result.append(_fed(layer, "model", (judged, reference, nudged), _stream(layer + 1)))
    if stop == number:
        result.append(_fed(number, "model", (judged, reference, nudged), _logits))
        if any(step.graph == "mtp" and judged.has(n, "logits") for n, (_, step) in enumerate(judged.cases)):
            result.append(_fed(number, "mtp", (judged, reference, nudged), _logits))
    return result


def look_inside(engine: EngineSide, walker: Walker, reference: Dump, layer: int, work: Path) -> FedLayer:
    """Run one layer of both on PyTorch's inputs and name the first point inside that differs.

    Args:
        engine: an engine of target cpu.
        walker: the PyTorch side.
        reference: a dump with what goes into `layer`, if that is not 0.
        layer: a layer of the main model.
        work: the folder for what is compared; it is removed.
    """
    only = (layer, layer + 1)
    config = walker.settings.config
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        taps = [tap for tap in engine.taps if tap.endswith(f".{layer}") and not tap.startswith(INTERMEDIATE_TENSORS)]
        judged = engine.dump_fed(reference, work / "judged", only, taps)
        walker.run(reference.plan, work, layers=only, subject=reference, points=_all_points(config, layer))
        dumps = (judged, Dump.open(work / REFERENCE), Dump.open(work / NOISE))
        whole = _fed(layer, "model", dumps, _stream(layer + 1))
        for point in _all_points(config, layer):
            one = spread(*dumps, _choices(f"{point}.{layer}") if point in SELECTIONS else _point(f"{point}.{layer}"))
            if one is not None and one.bad:
                return FedLayer(
                    layer, "model", whole.error, whole.allowed, whole.bad, point, f"first at {point}: {one.error:.1e}"
                )
        return whole
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _all_points(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """Return the points of a layer in the order of data, selections where they are made."""
    points = list(layer_points(config, layer))
    points.insert(points.index("o_latent"), SELECTIONS[0])
    if config.is_moe_layer(layer):
        points.insert(points.index("expert_weights"), SELECTIONS[1])
    return tuple(points)


def _fed(layer: int, graph: str, dumps: tuple[Dump, Dump, Dump], rows: Rows) -> FedLayer:
    one = spread(*dumps, rows, graph)
    assert one is not None, (layer, graph)
    return FedLayer(layer, graph, one.error, one.allowed, one.bad)


def _stream(layer: int) -> Rows:
    return lambda dump, number: stream_rows(dump, number, layer)


def _point(name: str) -> Rows:
    return lambda dump, number: dump.rows(number, name) if dump.has(number, name) else None


def _choices(name: str) -> Rows:
    return lambda dump, number: np.sort(dump.rows(number, name), -1) if dump.has(number, name) else None


def _logits(dump: Dump, number: int) -> np.ndarray | None:
    return dump.tensor(number, "logits") if dump.has(number, "logits") else None
