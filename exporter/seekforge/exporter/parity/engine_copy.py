"""An engine for the CPU once more with other graphs beside the same weights: with taps, or cut in two."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import onnx

from seekforge.common.errors import EngineError
from seekforge.common.paths import inside, real_path
from seekforge.exporter.builder.request import read_engine_graph
from seekforge.exporter.program.taps import TAP_NAME, expose, tap_specs, taps_in
from seekforge.formats.engine.manifest import MANIFEST, Manifest, digest_file, load_manifest, save_manifest
from seekforge.formats.program import GraphIO


def available_taps(engine: Path) -> list[str]:
    """Return the taps that an engine gives or could give, of all its graphs.

    Raises:
        EngineError: not an engine folder.
    """
    manifest = load_manifest(engine)
    result = []
    for graph_io in manifest.graphs.values():
        result += [
            spec.name for spec in graph_io.outputs if spec.role in ("tap", "debug") and TAP_NAME.fullmatch(spec.name)
        ]
        if manifest.target.backend == "onnxruntime" and manifest.ranks is None:
            result += taps_in(read_engine_graph(engine, graph_io))
    return result


def tapped_copy(engine: Path, out: Path, names: Collection[str]) -> Path:
    """Write an engine for the CPU that also gives `names`, beside its weights, which are linked and not copied.

    Args:
        engine: an engine of target cpu.
        out: the folder to make.
        names: the taps to add; those that it gives already, or that are not there, are left as they are.

    Raises:
        EngineError: the engine is not one of ONNX Runtime: its graph is compiled and cannot be opened; or ranks share
            it.
    """

    def edit(name: str, model: onnx.ModelProto, graph_io: GraphIO) -> GraphIO:
        added = [tap for tap in taps_in(model) if tap in names]
        expose(model, added)
        return graph_io.model_copy(update={"outputs": (*graph_io.outputs, *tap_specs(model, added))})

    engine_copy(engine, out, edit)
    return out


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
        edit: takes a graph's name, its model, which it changes in place, and its inputs and outputs; returns the new
            inputs and outputs.
        graphs: which graphs to take; None: all.

    Raises:
        EngineError: the engine is not one of ONNX Runtime: its graph is compiled and cannot be opened; or ranks share
            it.
    """
    manifest = load_manifest(engine)
    if manifest.ranks is not None:
        raise EngineError(f"{engine}: an engine of several ranks shows no inner tensors; compare one of one rank")
    if manifest.target.backend != "onnxruntime":
        raise EngineError(
            f"{engine}: an engine of the {manifest.target.backend} backend shows no inner tensors; "
            "build it with --taps to see inside layers"
        )
    out.mkdir(parents=True)
    copied: dict[str, GraphIO] = {}
    changed = {graph_io.file for graph_io in manifest.graphs.values()}
    for file in manifest.files:
        if file.path not in changed:
            _link(inside(engine, file.path, error=EngineError, where=engine / MANIFEST), out / file.path)
    for name, graph_io in manifest.graphs.items():
        if graphs is not None and name not in graphs:
            continue
        model = read_engine_graph(engine, graph_io)
        edited = edit(name, model, graph_io)
        (out / graph_io.file).write_bytes(model.SerializeToString())
        copied[name] = edited.model_copy(update={"sha256": digest_file(out, graph_io.file).sha256})
    written = {graph_io.file for graph_io in copied.values()}
    files = tuple(
        digest_file(out, file.path) if file.path in written else file
        for file in manifest.files
        if file.path in written or file.path not in changed
    )
    copy: Manifest = manifest.model_copy(update={"graphs": copied, "files": files, "digest": ""})
    save_manifest(out, copy)
    return copy


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real_path(source), target)
    except OSError:  # another disk: no engine may have links that lead out of its folder, ONNX Runtime opens none
        shutil.copyfile(source, target)
