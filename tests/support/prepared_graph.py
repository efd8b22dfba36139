"""Graphs as a GPU build gives them to TensorRT."""

from __future__ import annotations

from typing import Any

import onnx

from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs
from seekforge.exporter.builder.tensorrt.graph import Prepared, prepare


def prepared(
    inputs: Inputs, planned: GpuBuild, graph: onnx.ModelProto, *, name: str = "model", **changed: Any
) -> Prepared:
    """Return a graph, or a part of one, prepared as a build does it.

    Args:
        inputs, planned: the build.
        graph: canonical.
        name: the program's graph that it is, or is a part of.
        changed: arguments of `prepare` in place of the build's own.
    """
    ours: dict[str, Any] = {
        "how": planned.how,
        "plugins": planned.plugins,
        "weights": planned.wide[name],
        "bf16_linears": planned.bf16_linears[name],
    }
    return prepare(graph, config=inputs.config, products="fp8", digests={}, **ours | changed)
