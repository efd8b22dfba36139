"""Bodies of `MoeExperts` in ONNX Runtime, and its form in the library, against the reference."""

from pathlib import Path

import onnx
import pytest
import torch
from tests.support.ort_session import open_session

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.moe_experts.function import folded_body
from seekforge.plugins.moe_experts.spec import FOLDED
from seekforge.plugins.quant import dequantize_weight
from seekforge.plugins.testing import Case, cases, max_error, run_function

#: f32 sums in another order, twice; a hidden value beside a rounding tie of e4m3 may still fall either way.
TOLERANCE = 5e-6

HOWS = [
    Specialization("f32", "float8", "f32", "ort"),
    Specialization("f32", "int8", "f32", "ort"),
    Specialization("f32", "int8", "f32", "trt"),
]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.bodies}-{how.fp8_storage}")
@pytest.mark.parametrize("case", cases("MoeExperts"), ids=str)
def test_body_computes_the_reference(case: Case, how: Specialization) -> None:
    typed = case.typed(how)
    (y,), (expected,) = run_function(case.op, typed.inputs, typed.attrs, how), typed.expected()
    assert expected.isfinite().all()
    assert max_error(y, expected) < TOLERANCE
    assert max_error(y * 1.01, expected) > TOLERANCE


@pytest.mark.parametrize("runs", ["body", "library"])
@pytest.mark.parametrize("case", cases("MoeExperts"), ids=str)
def test_folded_form_computes_the_reference(case: Case, runs: str, library: Path) -> None:
    x, ids, weights, w13, w13_scale, w2, w2_scale = case.inputs
    folded = [
        torch.stack([dequantize_weight(w, s).T for w, s in zip(stack, scales, strict=True)]).contiguous()
        for stack, scales in ((w13, w13_scale), (w2, w2_scale))
    ]
    names = ["x", "expert_ids", "expert_weights", "w13", "w2"]
    node = onnx.helper.make_node(FOLDED, names, ["y"], domain="seekforge", **case.attrs)
    value = onnx.helper.make_tensor_value_info
    types = [onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.FLOAT]
    feeds = dict(zip(names[:3], (x.numpy(), ids.numpy(), weights.numpy()), strict=True))
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value(name, kind, array.shape) for (name, array), kind in zip(feeds.items(), types, strict=True)],
        [value("y", onnx.TensorProto.FLOAT, tuple(x.shape))],
        initializer=[onnx.numpy_helper.from_array(w.numpy(), n) for w, n in zip(folded, names[3:], strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("seekforge", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[folded_body(case.attrs)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    if runs == "library":
        del model.functions[:]
    session = open_session(model.SerializeToString(), library=library if runs == "library" else None)
    assert max_error(torch.from_numpy(session.run(None, feeds)[0]), case.expected()[0]) < TOLERANCE
