"""An engine for the CPU once more with other graphs beside the same weights: with taps, or cut in two.

Ranks of a stage run the same pieces. What they have inside layers is shown by the name of the tap on the first of them,
and by names of their own on the others (`formats.engine.ranks.shown_name`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

import onnx
from onnx import helper

from seekforge.common.errors import EngineError
from seekforge.common.paths import inside, real_path
from seekforge.exporter.builder.request import read_engine_graph
from seekforge.exporter.models import family_of
from seekforge.exporter.program.taps import TAP_NAME, expose, tap_specs, taps_in
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.engine.manifest import MANIFEST, Manifest, digest_file, load_manifest, save_manifest
from seekforge.formats.engine.ranks import Ranks, is_handed_on, joined, shown_name
from seekforge.formats.program import GraphIO
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, MODEL

#: What ranks add up behind a dense MLP, as their dumps call it.
DENSE_PART: Final = "mlp_part"


def available_taps(engine: Path) -> list[str]:
    """Return the taps that an engine gives or could give, of all its graphs: none of several GPUs together, since each
    has a part of its own and shows no other.

    Raises:
        EngineError: not an engine folder.
    """
    manifest = load_manifest(engine)
    result = []
    if manifest.ranks is not None and manifest.target.backend != "onnxruntime":
        return result
    for name, graph_io in manifest.graphs.items():
        result += [
            spec.name for spec in graph_io.outputs if spec.role in ("tap", "debug") and TAP_NAME.fullmatch(spec.name)
        ]
        if manifest.target.backend == "onnxruntime":
            for piece in manifest.plans(name):
                model = read_engine_graph(engine, piece)
                result += [*taps_in(model), *stream_taps(model, manifest.ranks, piece.file)]
    return result


def tapped_copy(engine: Path, out: Path, names: Collection[str]) -> Path:
    """Write an engine for the CPU that also gives `names`, beside its weights, which are linked and not copied.

    Args:
        engine: an engine of target cpu.
        out: the folder to make.
        names: the taps to add; those that it gives already, or that are not there, are left as they are.

    Raises:
        EngineError: the engine is not one of ONNX Runtime: its graph is compiled and cannot be opened.
    """
    manifest = load_manifest(engine)
    ranks, taps = manifest.ranks, family_of(ModelConfig.parse(manifest.config, str(engine))).taps
    weight = re.compile(rf"layers\.(\d+)\.{re.escape(taps.dense_output)}\.weight")

    def edit(name: str, model: onnx.ModelProto, graph_io: GraphIO) -> GraphIO:
        parts = {} if ranks is None else _dense_parts(model, weight)
        for tap, value in (stream_taps(model, ranks, graph_io.file) | parts).items():
            model.graph.node.append(helper.make_node("Identity", [value], [tap], f"{tap}/Identity"))
        layers = {name.rpartition(".")[2] for name in names}
        added = [tap for tap in taps_in(model) if tap in names]
        added += [tap for tap in parts if tap.rpartition(".")[2] in layers]
        expose(model, added)
        return graph_io.model_copy(update={"outputs": (*graph_io.outputs, *tap_specs(model, added))})

    copy = engine_copy(engine, out, edit)
    if ranks is not None:
        graphs = {name: _with_ranks(copy, ranks, name) for name in copy.graphs}
        save_manifest(out, copy.model_copy(update={"graphs": graphs, "digest": ""}))
    return out


def stream_taps(model: onnx.ModelProto, ranks: Ranks | None, file: str) -> dict[str, str]:
    """Return the taps of the residual stream between pipeline stages, which stages hand on as a sum -> the values.

    Args:
        model: a piece.
        ranks: the layout; None: an engine of one rank, of which it is a whole graph.
        file: the name of the piece's file.
    """
    if ranks is None:
        return {}
    stages = zip(ranks.pipeline_stages, ranks.pieces.get(MODEL, ()))
    border = next((stop for (_, stop), stems in stages if Path(file).stem in stems), None)
    totals = [node for node in model.graph.node if node.op_type == "Add" and is_handed_on(node.output[0])]
    if border is None or len(totals) != 1:
        return {}
    return {f"{point}.{border}": value for point, value in zip(INTERMEDIATE_TENSORS, totals[0].input)}


def _dense_parts(model: onnx.ModelProto, weight: re.Pattern[str]) -> dict[str, str]:
    """Return what ranks add up behind a dense MLP, of which no tap tells -> the values; `weight` is that of a layer."""
    taps: dict[str, str] = {}
    for node in model.graph.node:
        layer = next((match[1] for name in node.input if (match := weight.match(name))), None)
        if layer is not None and node.output[0] != f"{DENSE_PART}.{layer}":
            taps[f"{DENSE_PART}.{layer}"] = node.output[0]
    return taps


def _with_ranks(manifest: Manifest, ranks: Ranks, graph: str) -> GraphIO:
    """Return what a graph gives together with what its single ranks show."""
    tp = ranks.parallelism.tp
    shown = [
        spec.model_copy(update={"name": shown_name(rank, spec.name)})
        for stage in range(ranks.parallelism.pp)
        for piece in ranks.pieces_of(graph, manifest.plans(graph), stage)
        for spec in piece.outputs
        if spec.role == "tap"
        for rank in range(stage * tp + 1, (stage + 1) * tp)
    ]
    whole = manifest.graphs[graph]
    return whole.model_copy(update={"outputs": (*whole.outputs, *shown)})


def engine_copy(
    engine: Path,
    out: Path,
    edit: Callable[[str, onnx.ModelProto, GraphIO], GraphIO],
    *,
    graphs: Collection[str] | None = None,
) -> Manifest:
    """Write an engine for the CPU with other graphs beside the same weights, which are linked and not copied.

    Args:
        engine: an engine of target cpu.
        out: the folder to make.
        edit: takes a graph's name, its model, or one of its pieces, which it changes in place, and inputs and outputs
            of that; returns the new inputs and outputs.
        graphs: which graphs to take; None: all.

    Raises:
        EngineError: the engine is not one of ONNX Runtime: its graph is compiled and cannot be opened.
    """
    manifest = load_manifest(engine)
    if manifest.target.backend != "onnxruntime":
        raise EngineError(
            f"{engine}: an engine of the {manifest.target.backend} backend shows no inner tensors; "
            "build it with --taps to see inside layers"
        )
    out.mkdir(parents=True)
    copied: dict[str, tuple[GraphIO, ...]] = {}
    changed = {piece.file for name in manifest.graphs for piece in manifest.plans(name)}
    for file in manifest.files:
        if file.path not in changed:
            _link(inside(engine, file.path, error=EngineError, where=engine / MANIFEST), out / file.path)
    for name in manifest.graphs:
        if graphs is not None and name not in graphs:
            continue
        pieces: list[GraphIO] = []
        for piece in manifest.plans(name):
            model = read_engine_graph(engine, piece)
            edited = edit(name, model, piece)
            (out / piece.file).write_bytes(model.SerializeToString())
            pieces.append(edited.model_copy(update={"sha256": digest_file(out, piece.file).sha256}))
        copied[name] = tuple(pieces)
    written = {piece.file for pieces in copied.values() for piece in pieces}
    files = tuple(
        digest_file(out, file.path) if file.path in written else file
        for file in manifest.files
        if file.path in written or file.path not in changed
    )
    wholes = {name: joined(pieces) if name in manifest.stages else pieces[0] for name, pieces in copied.items()}
    stages = {name: pieces for name, pieces in copied.items() if name in manifest.stages}
    copy: Manifest = manifest.model_copy(update={"graphs": wholes, "stages": stages, "files": files, "digest": ""})
    save_manifest(out, copy)
    return copy


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real_path(source), target)
    except OSError:  # another disk: no engine may have links that lead out of its folder, ONNX Runtime opens none
        shutil.copyfile(source, target)
