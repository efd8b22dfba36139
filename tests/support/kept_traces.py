"""Graphs that `export` has traced in this run: the same settings give the same graph, so each is traced once."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.made_once import made_once

#: The module whose `trace` is replaced; importing it brings torch.
EXPORT = "seekforge.exporter.program.export"
_GRAPH, _REST = "graph.onnx", "rest.pickle"


def keep_traces(patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let `export` take from a file what it has traced before; nothing is done where no test that runs imports it.

    Who bends the model, or the trace, calls `trace_anew` for as long as that lasts.
    """
    module = sys.modules.get(EXPORT)
    if module is not None:
        patch.setattr(module, "trace", kept(module.trace, lambda name, make: made_once(tmp_path_factory, name, make)))


def trace_anew(patch: pytest.MonkeyPatch) -> None:
    """Let `export` trace by itself."""
    from seekforge.exporter.program.trace import trace

    patch.setattr(f"{EXPORT}.trace", trace)


def kept(trace: Callable[..., Any], made: Callable[[str, Callable[[Path], None]], Path]) -> Callable[..., Any]:
    """Return a `trace` that keeps its results: in folders that `made` makes, of a name and of what fills them."""

    def kept_trace(settings: Any, layer_range: tuple[int, int] | None, progress: Callable[[str], None]) -> Any:
        import onnx

        from seekforge.exporter.program.trace import Traced

        def make(folder: Path) -> None:
            stages: list[str] = []
            result = trace(settings, layer_range, stages.append)
            (folder / _GRAPH).write_bytes(result.model.SerializeToString())
            (folder / _REST).write_bytes(pickle.dumps((stages, result.recipes, result.aliases, result.output_names)))

        digest = hashlib.sha256(repr((settings, layer_range)).encode()).hexdigest()
        folder = made(f"trace-{digest[:24]}", make)
        stages, *rest = pickle.loads((folder / _REST).read_bytes())
        for stage in stages:
            progress(stage)
        return Traced(onnx.ModelProto.FromString((folder / _GRAPH).read_bytes()), *rest)

    return kept_trace
