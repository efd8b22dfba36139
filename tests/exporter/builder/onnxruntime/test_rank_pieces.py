from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from tests.support.ort_session import open_session

from seekforge.exporter.builder.onnxruntime.rank_pieces import cut_at_sums
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION

#: Beside the result, what is handed on as it is, what is added up, and a sum.
OUTPUTS = ("result", "triple", "double", "total")


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
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in OUTPUTS],
        constants,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def test_a_graph_is_cut_at_its_sums_and_computes_the_same() -> None:
    pieces = cut_at_sums(_model())
    inputs = [sorted(value.name for value in piece.graph.input) for piece in pieces]
    handed = [name for name in inputs[1] if name.startswith("local.")]
    assert inputs == [["x"], [*handed, "sum.0", "x"], ["sum.1"]] and len(handed) == 1
    outputs = [[value.name for value in piece.graph.output] for piece in pieces]
    assert outputs == [["triple", "double", "partial.0", *handed], ["total", "partial.1"], ["result"]]
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
    total = 2 * xs[0] + 2 * xs[1]
    expected = sum(np.maximum(total, 0) + 3 * x + x for x in xs)
    for x, one in zip(xs, values, strict=True):
        for name, value in zip(OUTPUTS, (expected, 3 * x, 2 * x, total), strict=True):
            np.testing.assert_array_equal(one[name], value, err_msg=name)


def test_pieces_are_fused_and_have_the_functions_that_they_call() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("SumRanks", ["double"], ["total"], domain=DOMAIN, num_ranks=2),
        helper.make_node("Mul", ["x", "one"], ["skip"]),
        helper.make_node("Add", ["skip", "total"], ["residual"]),
        helper.make_node("RMSNormalization", ["residual", "weight"], ["norm"], axis=-1, epsilon=1e-6),
    ]
    constants = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("weight", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value(name, TensorProto.FLOAT, ["N", 3]) for name in ("norm", "residual")]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["N", 3])], outputs, constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    first, second = cut_at_sums(helper.make_model(graph, opset_imports=opsets, ir_version=11))
    assert [node.op_type for node in second.graph.node if node.domain == DOMAIN] == ["AddRmsNorm"]
    assert [[function.name for function in piece.functions] for piece in (first, second)] == [[], ["AddRmsNorm"]]
    assert [entry.domain for entry in first.opset_import] == [""]
    x = np.array([[1.0, -2.0, 0.5]], np.float32)
    results = open_session(second.SerializeToString()).run(["norm", "residual"], {"x": x, "sum.0": 4 * x})
    norm, residual = map(np.asarray, results)
    np.testing.assert_array_equal(residual, 5 * x)
    np.testing.assert_allclose(norm, 5 * x / np.sqrt(np.mean(25 * x * x) + 1e-6) * [1, 2, 3], rtol=1e-6)
