"""Bodies of `BlockFp8Linear` in ONNX Runtime against the reference."""

import numpy as np
import onnx
import pytest
import torch
from tests.support.ort_session import open_session

from seekforge.plugins.block_fp8_linear.spec import FOLDED
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.quant import dequantize_weight
from seekforge.plugins.testing import Case, cases, max_error, run_function

#: f32 sums of up to 384 products in another order.
TOLERANCE = 2e-6

HOWS = [Specialization("f32", storage, "f32", bodies) for storage in ("float8", "int8") for bodies in ("ort", "trt")]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.fp8_storage}")
@pytest.mark.parametrize("case", cases("BlockFp8Linear"), ids=str)
def test_body_computes_the_reference(case: Case, how: Specialization) -> None:
    typed = case.typed(how)
    (y,), (expected,) = run_function(case.op, typed.inputs, typed.attrs, how), typed.expected()
    assert max_error(y, expected) < TOLERANCE
    assert max_error(y * 1.01, expected) > TOLERANCE


@pytest.mark.parametrize("case", cases("BlockFp8Linear"), ids=str)
def test_folded_body_computes_the_reference(case: Case) -> None:
    x, weight, scale = case.inputs
    folded = dequantize_weight(weight, scale).T.contiguous().numpy()
    node = onnx.helper.make_node(FOLDED, ["x", "w"], ["y"], domain="seekforge", **case.attrs)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, tuple(x.shape))],
        [value("y", onnx.TensorProto.FLOAT, (*x.shape[:-1], weight.shape[0]))],
        initializer=[onnx.numpy_helper.from_array(np.ascontiguousarray(folded), "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("seekforge", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    attach(model, HOWS[0])
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString())
    y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert max_error(y, case.expected()[0]) < TOLERANCE
