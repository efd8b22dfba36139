"""The ONNX schemas: symbolic sizes pass through, what differs from the contract is refused."""

import onnx
import pytest
from onnx import TensorProto, helper
from onnx.shape_inference import InferenceError

from seekforge.plugins.onnx_schema import make_schema, register_schemas
from seekforge.plugins.operator import OpSpec
from seekforge.plugins.registry import SPECS

BF16, F8, F32 = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT


@pytest.fixture(autouse=True)
def _schemas() -> None:
    register_schemas()
    register_schemas()  # twice does no harm


def linear(
    x: list[int | str], *, scale: list[int | str] | None = None, weight_type: int = F8, **attrs: object
) -> onnx.ModelProto:
    """x [..., 256] through a 576 × 256 linear, then an Identity of unknown sizes."""
    node = helper.make_node("BlockFp8Linear", ["x", "w", "s"], ["y"], domain="seekforge")
    for name, value in ({"act_quant": "ue8m0"} | attrs).items():
        node.attribute.append(helper.make_attribute(name, value))
    graph = helper.make_graph(
        [node, helper.make_node("Identity", ["y"], ["z"])],
        "g",
        [
            helper.make_tensor_value_info("x", BF16, x),
            helper.make_tensor_value_info("w", weight_type, [576, 256]),
            helper.make_tensor_value_info("s", F32, [5, 2] if scale is None else scale),
        ],
        [helper.make_tensor_value_info("z", BF16, [f"o{i}" for i in range(len(x))])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("seekforge", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def shape_of(model: onnx.ModelProto, name: str) -> list[int | str]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    value = next(v for v in inferred.graph.value_info if v.name == name)
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("lead", [["B", "Q"], [3], ["T"], [2, "Q", 4]])
def test_symbolic_sizes_pass_through(lead: list[int | str]) -> None:
    model = linear([*lead, 256], plugin_namespace="seekforge")
    onnx.checker.check_model(model, full_check=True)
    assert shape_of(model, "y") == [*lead, 576]


def test_nothing_is_told_behind_an_operator_that_is_unknown() -> None:
    """Types that others noted stay, and nothing fails."""
    model = linear(["B", 256])
    model.graph.node.insert(0, helper.make_node("Unknown", ["x"], ["hidden"], domain="com.microsoft"))
    model.graph.node[1].input[0] = "hidden"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    inferred = onnx.shape_inference.infer_shapes(model)
    assert not inferred.graph.value_info
    model.graph.value_info.append(helper.make_tensor_value_info("hidden", BF16, ["B", 256]))
    assert shape_of(model, "y") == ["B", 576]


def test_attributes_give_sizes() -> None:
    node = helper.make_node("MoeRoute", ["l", "b"], ["i", "w"], domain="seekforge", norm=1, scale=2.5, top_k=8)
    node.attribute.extend([helper.make_attribute("n_group", 8), helper.make_attribute("topk_group", 4)])
    more = [helper.make_node("Identity", [n], [n + "2"]) for n in "iw"]
    graph = helper.make_graph(
        [node, *more],
        "g",
        [helper.make_tensor_value_info("l", F32, ["T", 256]), helper.make_tensor_value_info("b", F32, [256])],
        [
            helper.make_tensor_value_info("i2", TensorProto.INT32, ["a", "b"]),
            helper.make_tensor_value_info("w2", F32, ["c", "d"]),
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("seekforge", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    assert shape_of(model, "i") == shape_of(model, "w") == ["T", 8]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (linear(["B", 255]), "weight is"),
        (linear(["B", 256], scale=[4, 2]), "weight_scale is"),
        (linear(["B", 256], act_quant="e5m2"), "act_quant is 'e5m2'"),
    ],
)
def test_what_differs_from_the_contract_is_refused(model: onnx.ModelProto, words: str) -> None:
    with pytest.raises(InferenceError, match=words):
        onnx.checker.check_model(model, full_check=True)


def test_unknown_attributes_and_types_are_refused() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute: more"):
        onnx.checker.check_model(linear(["B", 256], more=1))
    with pytest.raises(InferenceError, match="weight is i32, expected f8e4m3 or i8 or bf16 or f32"):
        onnx.checker.check_model(linear(["B", 256], weight_type=TensorProto.INT32), full_check=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_schema_has_the_names_of_its_spec(spec: OpSpec) -> None:
    schema = make_schema(spec)
    assert [i.name for i in schema.inputs] == [arg.name for arg in spec.all_inputs]
    optional = {i.name for i in schema.inputs if i.option == onnx.defs.OpSchema.FormalParameterOption.Optional}
    assert optional == {arg.name for arg in spec.optional}
    assert [o.name for o in schema.outputs] == [arg.name for arg in spec.outputs]
    assert set(schema.attributes) == {attr.name for attr in spec.attrs} | {"plugin_namespace"}
    assert not schema.attributes["plugin_namespace"].required
