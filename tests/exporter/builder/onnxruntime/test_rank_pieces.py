from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from tests.support.ort_session import open_session

from seekforge.exporter.builder.onnxruntime.rank_pieces import cut_at_sums
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION


def _model() -> onnx.ModelProto:
    """y = relu(Σ 2x) + 3x, then Σ over y + x, where an If reads a value of the first piece."""
    then = helper.make_graph(
        [helper.make_node("Add", ["relu", "triple"], ["then_y"])],
        "then",
        [],
        [helper.make_tensor_value_info("then_y", TensorProto.FLOAT, ["N"])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["relu"], ["else_y"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_y", TensorProto.FLOAT, ["N"])],
    )

    def sum_ranks(x: str, y: str) -> onnx.NodeProto:
        return helper.make_node("SumRanks", [x], [y], domain=DOMAIN, num_ranks=2)

    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("Mul", ["x", "three"], ["triple"]),
        sum_ranks("double", "total"),
        helper.make_node("Relu", ["total"], ["relu"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["y", "x"], ["part"]),
        sum_ranks("part", "z"),
        helper.make_node("Identity", ["z"], ["result"]),
    ]
    constants = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("three", TensorProto.FLOAT, [], [3.0]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("result", "triple")],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_a_graph_is_cut_at_its_sums_and_computes_the_same() -> None:
    pieces = cut_at_sums(_model())
    inputs = [sorted(value.name for value in piece.graph.input) for piece in pieces]
    assert inputs == [["x"], ["sum.0", "triple", "x"], ["sum.1"]]
    assert [value.name for value in pieces[0].graph.output] == ["triple", "partial.0"]
    xs = [np.array([1.0, -2.0, 0.5], np.float32), np.array([0.5, 1.0, -3.0], np.float32)]
    values: list[dict[str, np.ndarray]] = [{"x": x} for x in xs]
    for piece in pieces:
        session = open_session(piece.SerializeToString())
        names = [value.name for value in session.get_outputs()]
        for one in values:
            feeds = {value.name: one[value.name] for value in session.get_inputs()}
            one |= dict(zip(names, session.run(names, feeds), strict=True))
        for name in names:
            if name.startswith("partial."):
                total = values[0][name] + values[1][name]
                for one in values:
                    one[f"sum.{name.partition('.')[2]}"] = total
    total = np.maximum(2 * xs[0] + 2 * xs[1], 0)
    expected = sum(total + 3 * x + x for x in xs)
    for one in values:
        np.testing.assert_array_equal(one["result"], expected)
