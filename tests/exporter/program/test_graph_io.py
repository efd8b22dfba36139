"""An ONNX graph is described by its inputs and outputs, each with a role."""

from __future__ import annotations

import onnx

from seekforge.exporter.program.graph_io import graph_io, roles_in
from seekforge.formats.program import TensorSpec

GRAPH = """<ir_version: 11, opset_import: ["" : 23]>
g (bfloat16[NS, 8] cache, int64[B, 3] ids) => (bfloat16[NS, 8] cache_out, float[B] logits) {
  cache_out = Identity(cache)
  total = ReduceSum<keepdims = 0>(ids)
  logits = Cast<to = 1>(total)
}"""


def test_a_graph_is_described_in_its_own_order() -> None:
    model = onnx.parser.parse_model(GRAPH)
    roles = {"cache": "cache", "cache_out": "cache", "ids": "token", "logits": "result"}
    described = graph_io(
        model, "model.onnx", role_of=roles.__getitem__, aliases={"cache_out": "cache", "gone_out": "gone"}, sha256="ab"
    )
    assert described.inputs == (
        TensorSpec(name="cache", dtype="bf16", shape=("NS", 8), role="cache"),
        TensorSpec(name="ids", dtype="i64", shape=("B", 3), role="token"),
    )
    assert [(spec.name, spec.shape) for spec in described.outputs] == [("cache_out", ("NS", 8)), ("logits", ("B",))]
    assert described.aliases == {"cache_out": "cache"}, "an output that another graph gives is no alias of this one"
    assert (described.file, described.sha256) == ("model.onnx", "ab")
    assert roles_in(described) == roles
