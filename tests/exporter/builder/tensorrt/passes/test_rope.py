"""RoPE in plain operators is RotaryEmbedding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.support.ort_session import open_session

from seekforge.exporter.builder.tensorrt.passes.rope import write_out_rope


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("heads", "size", "width"), [(1, 64, 64), (4, 128, 64), (2, 6, 4)])
def test_plain_operators_give_what_the_operator_gives(interleaved: int, heads: int, size: int, width: int) -> None:
    inputs = {"x": ["B", "Q", heads * size], "cos": ["B", "Q", width // 2], "sin": ["B", "Q", width // 2]}
    attrs = {"interleaved": interleaved, "num_heads": heads, "rotary_embedding_dim": width}
    rope = helper.make_node("RotaryEmbedding", list(inputs), ["y"], name="layers.0/RotaryEmbedding", **attrs)
    graph = helper.make_graph(
        [rope, helper.make_node("Neg", ["y"], ["z"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    write_out_rope(plain)
    assert "RotaryEmbedding" not in {node.op_type for node in plain.graph.node}
    assert all(node.name.startswith("layers.0/RotaryEmbedding_") for node in plain.graph.node[:-1])
    draw = np.random.default_rng(0)
    for batch in ((2, 3), (1, 1), (1, 5)):
        given = {name: draw.standard_normal((*batch, shape[-1]), np.float32) for name, shape in inputs.items()}
        expected, found = (open_session(one.SerializeToString()).run(None, given)[0] for one in (model, plain))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert np.ptp(found) > 1
