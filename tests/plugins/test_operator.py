"""The contract language: names, binding of symbolic sizes, dtypes, attributes."""

import subprocess
import sys

import pytest

from seekforge.common.errors import ShapeError
from seekforge.plugins.operator import Arg, Attr, OpSpec, evaluate_dim
from seekforge.plugins.registry import SPECS

LINEAR = SPECS["BlockFp8Linear"]


def test_torch_schema_lists_tensors_then_attributes() -> None:
    assert LINEAR.torch_name == "block_fp8_linear"
    assert LINEAR.torch_schema() == "(Tensor x, Tensor weight, Tensor weight_scale, str act_quant) -> Tensor"
    assert SPECS["MoeRoute"].torch_schema().endswith("-> (Tensor, Tensor)")


def test_leading_axes_of_any_number_pass_through() -> None:
    for lead in [(), (4,), (2, 3), (1, 2, 3)]:
        bound = LINEAR.bind([(*lead, 256), (576, 256), (5, 2)], {"act_quant": "none"})
        assert LINEAR.output_shapes(bound) == [(*lead, 576)]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(2, 256), (576, 128), (5, 2)], "weight is"),
        ([(2, 256), (576, 256), (4, 2)], "weight_scale is"),
        ([(2, 256), (576, 256, 1), (5, 2)], "weight is"),
        ([(), (576, 256), (5, 2)], "x is"),
    ],
)
def test_a_wrong_size_names_the_argument(shapes: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        LINEAR.bind(shapes, {"act_quant": "none"})


def test_sizes_that_are_no_numbers_are_not_compared() -> None:
    bound = SPECS["DsaIndexer"].bind(
        [("b", "q", 64, 128), ("b", "q", 64), ("ns", 128), ("b", "mb"), ("b", "q")], {"index_topk": 2048}
    )
    assert SPECS["DsaIndexer"].output_shapes(bound) == [("b", "q", 2048)]


@pytest.mark.parametrize(
    ("expression", "value"), [("cdiv(N, 128)", 5), ("N // 2", 288), ("N * 2 + 1", 1153), (7, 7), ("N", 576)]
)
def test_shape_expressions(expression: str | int, value: int) -> None:
    assert evaluate_dim(expression, {"N": 576}) == value


def test_other_expressions_are_refused() -> None:
    with pytest.raises(ValueError, match="cdiv"):
        evaluate_dim("N - 1", {"N": 2})


def test_one_type_variable_has_one_value() -> None:
    write = SPECS["DsaCacheWrite"]
    types = dict.fromkeys(("c", "k_pe", "index_k"), "f32") | {"slot_mapping": "i64"}
    assert write.output_dtypes(types | {"latent_cache": "bf16", "index_cache": "bf16"}) == ["bf16", "bf16"]
    with pytest.raises(ShapeError, match="index_cache is f32, expected bf16"):
        write.output_dtypes(types | {"latent_cache": "bf16", "index_cache": "f32"})
    with pytest.raises(ShapeError, match="slot_mapping is i32"):
        write.output_dtypes(types | {"latent_cache": "f32", "index_cache": "f32", "slot_mapping": "i32"})


OPTIONAL = OpSpec(
    name="Optional",
    version=1,
    doc="for the test",
    inputs=(Arg("x", "act", ("*lead", "K"), "rows"),),
    optional=(Arg("weight", "fp8", ("N", "K"), "a weight"), Arg("bias", "f32", ("N",), "added")),
    outputs=(Arg("y", "act", ("*lead", "K"), "rows"),),
    attrs=(),
)


def test_optional_inputs_may_be_left_out_from_the_end() -> None:
    assert OPTIONAL.bind([(2, 8)], {}) == {"*lead": (2,), "K": 8, "N": 0}
    assert OPTIONAL.bind([(2, 8), (4, 8)], {})["N"] == 4
    assert list(OPTIONAL.named(["a", "b"])) == ["x", "weight"]
    assert OPTIONAL.output_dtypes({"x": "bf16", "weight": "i8"}) == ["bf16"]
    with pytest.raises(ShapeError, match=r"Optional: weight is \[4, 9\]"):
        OPTIONAL.bind([(2, 8), (4, 9)], {})
    with pytest.raises(ShapeError, match="weight is f64"):
        OPTIONAL.output_dtypes({"x": "bf16", "weight": "f64"})


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_or_too_many_inputs_are_refused(count: int) -> None:
    with pytest.raises(ShapeError, match=f"Optional: {count} inputs, expected 1 to 3"):
        OPTIONAL.bind([(2, 8)] * count, {})


def test_torch_and_programs_know_nothing_of_optional_inputs() -> None:
    assert OPTIONAL.torch_schema() == "(Tensor x) -> Tensor"


@pytest.mark.parametrize("attrs", [{}, {"act_quant": "none", "more": 1}, {"act_quant": "e5m2"}])
def test_attributes_are_checked(attrs: dict[str, object]) -> None:
    with pytest.raises(ShapeError, match="BlockFp8Linear"):
        LINEAR.check_attrs(attrs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_contract_is_consistent(spec: OpSpec) -> None:
    args = (*spec.inputs, *spec.optional, *spec.outputs)
    names = [arg.name for arg in args]
    assert len(set(names)) == len(names)
    assert all(isinstance(arg, Arg) and arg.doc for arg in args)
    assert all(isinstance(attr, Attr) and attr.doc for attr in spec.attrs)
    shapes = {arg.name: (arg.dtype, arg.shape) for arg in (*spec.inputs, *spec.outputs)}
    assert all(shapes[output] == shapes[given] for output, given in spec.aliases)


def test_contracts_and_bodies_import_no_torch() -> None:
    code = "import seekforge.plugins.functions.attach, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
