"""Attaching bodies to a model, and which combinations have none."""

import onnx
import pytest

from seekforge.common.errors import ProgramError
from seekforge.plugins.functions.attach import attach, make_body
from seekforge.plugins.functions.specialization import CANONICAL, Specialization
from seekforge.plugins.registry import SPECS
from seekforge.plugins.testing import Case, cases, check_body, make_node, one_node_model
from seekforge.plugins.torch_ops import DTYPE_NAMES

F32 = Specialization("f32", "float8", "f32", "ort")


def two_linears(first: str, second: str) -> onnx.ModelProto:
    nodes = [make_node("BlockFp8Linear", {"act_quant": q}, f"n{i}") for i, q in enumerate((first, second))]
    nodes[1].output[0] = "z"
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [
            value("x", onnx.TensorProto.FLOAT, ["B", "Q", 256]),
            value("weight", onnx.TensorProto.FLOAT8E4M3FN, [128, 256]),
            value("weight_scale", onnx.TensorProto.FLOAT, [1, 2]),
        ],
        [value(name, onnx.TensorProto.FLOAT, ["B", "Q", 128]) for name in "yz"],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)


def test_nodes_share_one_function_and_carry_the_namespace() -> None:
    model = two_linears("none", "none")
    attach(model, F32)
    attach(model, F32)  # replaces, never doubles
    assert [f.name for f in model.functions] == ["BlockFp8Linear"]
    assert [(e.domain, e.version) for e in model.opset_import] == [("", 23), ("seekforge", 1)]
    for node in model.graph.node:
        assert [a.s for a in node.attribute if a.name == "plugin_namespace"] == [b"seekforge"]
    check_body(model)


def test_differing_attributes_are_refused_by_name() -> None:
    with pytest.raises(ProgramError, match="BlockFp8Linear: attribute act_quant is 'ue8m0' on node 'n1'"):
        attach(two_linears("none", "ue8m0"), F32)


def test_an_unknown_operator_or_attribute_is_refused() -> None:
    model = two_linears("none", "none")
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ProgramError, match=r"no operator seekforge\.Nonsense"):
        attach(model, F32)
    model = two_linears("none", "none")
    del model.graph.node[0].attribute[:]
    with pytest.raises(ProgramError, match=r"attributes \[\], expected \['act_quant'\]"):
        attach(model, F32)


def test_every_operator_has_a_body_with_its_signature() -> None:
    assert {case.op for case in cases()} == SPECS.keys()
    for case in {c.op: c.typed(F32) for c in cases()}.values():
        function = make_body(case.op, case.attrs, F32)
        assert list(function.input) == [arg.name for arg in case.spec.inputs]
        assert list(function.output) == [arg.name for arg in case.spec.outputs]
        assert set(function.attribute) == {*case.attrs, "plugin_namespace"}


@pytest.mark.parametrize(
    ("op", "changed", "how"),
    [
        ("DsaCacheWrite", {"kv_format": "fp8_ds"}, F32),
        ("DsaCacheWrite", {"index_format": "fp8_ds"}, F32),
        ("DsaIndexer", {"index_format": "fp8_ds"}, F32),
        ("DsaAttention", {"kv_format": "fp8_ds"}, F32),
        ("MoeExperts", {}, Specialization("f32", "float8", "f32", "trt")),
    ],
)
def test_what_has_no_body_says_what_to_do(op: str, changed: dict[str, str], how: Specialization) -> None:
    with pytest.raises(ProgramError, match=f"{op}: .* plugin"):
        make_body(op, cases(op)[0].attrs | changed, how)


TYPINGS = [
    CANONICAL,
    Specialization("bf16", "int8", "bf16", "ort"),
    Specialization("bf16", "int8", "bf16", "trt"),
    Specialization("f32", "int8", "bf16", "trt"),
]


@pytest.mark.parametrize("how", TYPINGS, ids=str)
@pytest.mark.parametrize("case", {c.op: c for c in cases()}.values(), ids=str)
def test_bodies_are_valid_onnx_in_every_typing(case: Case, how: Specialization) -> None:
    """ONNX Runtime cannot compute in bf16, but the program must type-check as it is shipped."""
    typed = case.typed(how)
    described = [[(DTYPE_NAMES[t.dtype], tuple(t.shape)) for t in ts] for ts in (typed.inputs, typed.expected())]
    check_body(one_node_model(case.op, typed.attrs, how, *described))
