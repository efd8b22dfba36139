"""The generic plugin without a GPU: types, fields, shapes and aliases as TensorRT-RTX asks for them."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from tests.support import stand_in_trt

from seekforge.common.errors import EngineError, EnvironmentFault, ShapeError
from seekforge.common.requirements import install
from seekforge.plugins.kernels.index import NO_KERNELS, Descriptors
from seekforge.plugins.kernels.launch_plan import op_kernels
from seekforge.plugins.operator import Arg, OpSpec
from seekforge.plugins.registry import SPECS
from seekforge.plugins.tensorrt import library
from seekforge.plugins.tensorrt.plugin import allowed, make_fields, read_fields, register


def field(name: str, value: Any) -> SimpleNamespace:
    if isinstance(value, str):
        return SimpleNamespace(name=name, data=np.frombuffer(value.encode() + b"\0", np.int8))
    return SimpleNamespace(name=name, data=np.array([value], np.float32 if isinstance(value, float) else np.int32))


ROUTE = {"n_group": 8, "topk_group": 4, "top_k": 8, "norm": 1, "scale": 2.5}


def test_fields_become_attribute_values() -> None:
    values = read_fields(SPECS["MoeRoute"], [field(*item) for item in ROUTE.items()])
    assert values["norm"] is True
    assert values["scale"] == 2.5
    assert values["kernel_digest"] == NO_KERNELS
    write = {"kv_format": "fp8_ds", "index_format": "fp8_ds", "kv_fp8": 1, "indexer_fp8": 0, "products": "fp8"}
    values = read_fields(SPECS["DsaCacheWrite"], [field(*item) for item in write.items()])
    assert (values["kv_format"], values["indexer_fp8"], values["products"]) == ("fp8_ds", False, "fp8")


def test_a_missing_or_wrong_field_is_named() -> None:
    with pytest.raises(ShapeError, match="MoeRoute: attributes"):
        read_fields(SPECS["MoeRoute"], [field("top_k", 8)])
    with pytest.raises(ShapeError, match="act_quant is 'int3'"):
        read_fields(SPECS["BlockFp8Linear"], [field("act_quant", "int3")])


@pytest.mark.parametrize(
    ("types", "pos", "found", "expected"),
    [
        (["bf16"], 0, "bf16", True),
        (["f32"], 0, "f32", True),
        (["i8"], 0, "i8", False),
        (["bf16", "f8e4m3", "f32"], 2, "f32", True),
        (["bf16", "i8", "f32"], 1, "i8", True),
        (["bf16", "bf16", "f32"], 1, "bf16", False),  # kept weights have no kernels
        (["bf16", "f8e4m3", "f32"], 3, "bf16", True),
        (["bf16", "f8e4m3", "f32"], 3, "f32", False),
    ],
)
def test_formats_follow_the_spec(types: list[str], pos: int, found: str, expected: bool) -> None:
    assert allowed(SPECS["BlockFp8Linear"], types, pos, 3, found) is expected


def test_types_of_both_caches_agree() -> None:
    assert not allowed(SPECS["DsaCacheWrite"], ["i8", "bf16"], 1, 6, "bf16")


@pytest.mark.parametrize(("types", "pos", "found", "expected"), [
    (["bf16", "i8"], 1, "i8", True),
    (["bf16", "f32"], 1, "f32", False),
    (["bf16", "i8"], 2, "bf16", True),
    (["bf16", "i8"], 2, "i8", False),
])  # fmt: skip
def test_formats_of_optional_inputs_are_the_specs_too(types: list[str], pos: int, found: str, expected: bool) -> None:
    spec = OpSpec(
        name="Scaled",
        version=1,
        doc="for the test",
        inputs=(Arg("x", "act", ("N",), "values"),),
        optional=(Arg("codes", "i8", ("N",), "the same as bytes"),),
        outputs=(Arg("y", "act", ("N",), "values"),),
        attrs=(),
    )
    assert allowed(spec, types, pos, 2, found) is expected


def test_kernels_are_found_by_sm_and_digest(tmp_path) -> None:
    with pytest.raises(EngineError, match="built without compiled kernels"):
        Descriptors(tmp_path, 89).find("MoeRoute", NO_KERNELS)
    with pytest.raises(EngineError, match=r"no kernels for sm89 with digest abc.*found none"):
        Descriptors(tmp_path, 89).find("MoeRoute", "abc")
    folder = tmp_path / "kernels"
    folder.mkdir()
    entry = '{"op": "MoeRoute", "sm": 120, "digest": "abc", "file": "route.json"}'
    (folder / "index.json").write_text(f'{{"format": 1, "kernels": [{entry}]}}')
    with pytest.raises(EngineError, match="found sm120 abc"):
        Descriptors(tmp_path, 89).find("MoeRoute", "abc")
    with pytest.raises(EngineError, match=r"route\.json: missing"):
        Descriptors(tmp_path, 120).find("MoeRoute", "abc")
    (folder / "route.json").touch()
    assert Descriptors(tmp_path, 120).find("MoeRoute", "abc") == folder / "route.json"
    (folder / "index.json").write_text("{}")
    with pytest.raises(EngineError, match="damaged"):
        Descriptors(tmp_path, 120)


def test_a_missing_library_names_what_to_install() -> None:
    advice = re.escape(f"tensorrt is not installed; {install('trt')} on the machine with the GPU")
    with pytest.raises(EnvironmentFault, match=advice):
        library.load("tensorrt")


@pytest.mark.parametrize("version", ["10.14.1", "12.0.1", "unknown"])
def test_an_unknown_version_is_refused(version: str) -> None:
    with pytest.raises(EnvironmentFault, match=r"at least 10\.15 and below 12\.0"):
        library.check_version("tensorrt", version)


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.0", "11.4.0.106"])
def test_both_generations_are_taken(version: str) -> None:
    library.check_version("tensorrt", version)


rtx = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import tensorrt_rtx"], capture_output=True, check=False).returncode != 0,
    reason="tensorrt-rtx is not installed",
)


@rtx
def test_a_crash_of_the_parser_is_cured_in_this_process() -> None:
    """Without the cure the first plugin node ends the process; with it the node becomes a plugin layer."""
    trt = library.load("tensorrt-rtx")
    registration = register(trt)
    assert register(trt) is registration, "once per process"
    shapes = {"x": ["B", "Q", 256], "weight": [384, 256], "weight_scale": [3, 2]}
    types = {"x": 16, "weight": 17, "weight_scale": 1}
    for name, expected in (("weight_scale", True), ("weight", False)):
        wrong = shapes if expected else shapes | {"weight": [384, 128]}
        node = onnx.helper.make_node(
            "BlockFp8Linear",
            list(shapes),
            ["y"],
            name="layers.0.self_attn.o_proj/BlockFp8Linear",
            domain="seekforge",
            act_quant="ue8m0",
            plugin_namespace="seekforge",
        )
        graph = onnx.helper.make_graph(
            [node],
            name,
            [onnx.helper.make_tensor_value_info(n, types[n], wrong[n]) for n in shapes],
            [onnx.helper.make_tensor_value_info("y", 16, ["B", "Q", 384])],
        )
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("seekforge", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
        network = trt.Builder(logger).create_network(0)
        assert trt.OnnxParser(network, logger).parse(model.SerializeToString()) is expected
        if expected:
            assert [network.get_layer(i).type.name for i in range(network.num_layers)].count("PLUGIN_V3") == 1
            assert tuple(network.get_output(0).shape) == (-1, -1, 384)
        else:
            assert (
                "weight_scale is [3, 2], expected" in registration.failures[-1]
                or "weight is" in (registration.failures[-1])
            )


@rtx
def test_a_plugin_serializes_its_attributes_and_is_not_made_to_run_without_kernels() -> None:
    trt = library.load("tensorrt-rtx")
    register(trt)
    creator = trt.get_plugin_registry().get_creator("DsaAttention", "1", "seekforge")
    fields, kept = make_fields(trt, {"scale": 0.5, "kv_format": "fp8_ds"})
    plugin = creator.create_plugin("one", fields, trt.TensorRTPhase.BUILD)
    assert kept, "a field only points at its data"
    written = read_fields(SPECS["DsaAttention"], plugin.get_fields_to_serialize())
    assert written == {"scale": 0.5, "kv_format": "fp8_ds", "products": "", "kernel_digest": "", "op_version": 0}
    assert plugin.clone().attrs == {"scale": 0.5, "kv_format": "fp8_ds"}
    with pytest.raises(EngineError, match="no kernels were given"):
        creator.create_plugin("one", fields, trt.TensorRTPhase.RUNTIME)


class FakeSource:
    """Gives one launcher and remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.enqueued: list[Any] = []

    def launcher(self, op: str, *, attrs: Any, products: str, digest: str) -> FakeSource:
        self.asked.append((op, dict(attrs), products, digest))
        return self

    def workspace_bytes(self, shapes: Any) -> int:
        return 4096

    def enqueue(self, *args: Any) -> None:
        self.enqueued.append(args)


def creator_of(trt: Any, op: str) -> Any:
    return next(one for one in register(trt).creators if one.name == op)


#: Attributes of one plugin with and one without aliased caches.
PLUGINS = {
    "BlockFp8Linear": {"act_quant": "ue8m0"},
    "DsaCacheWrite": {"kv_format": "bf16", "index_format": "bf16", "kv_fp8": 1, "indexer_fp8": 1},
}
MODULES = [stand_in_trt, pytest.param(None, marks=rtx, id="tensorrt-rtx")]
COPIES = [lambda one: one, lambda one: one.clone(), lambda one: one.attach_to_context(None)]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("copy", [*COPIES, lambda one: one.attach_to_context(None).clone()])
@pytest.mark.parametrize("op", PLUGINS)
def test_a_plugin_does_no_work_while_an_engine_is_built(op: str, copy: Any, module: Any) -> None:
    """TensorRT may time it, on made-up pointers; a failure there would be an operator without implementation."""
    trt = module or library.load("tensorrt-rtx")
    fields, kept = make_fields(trt, PLUGINS[op])
    creator, registration = creator_of(trt, op), register(trt)
    before = list(registration.failures)
    plugin = copy(creator.create_plugin("one", fields, trt.TensorRTPhase.BUILD))
    assert kept
    assert plugin.get_valid_tactics() == [], "one way to run, so nothing to time"
    assert plugin.enqueue([], [], [1], [2], 3, 4) is None
    assert registration.failures == before


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("op", PLUGINS)
def test_a_plugin_of_an_opened_engine_raises_where_it_has_no_kernels(op: str, copy: Any, module: Any) -> None:
    trt = module or library.load("tensorrt-rtx")
    source = FakeSource()
    fields, kept = make_fields(trt, PLUGINS[op])
    creator = creator_of(trt, op)
    with pytest.raises(EngineError, match="no kernels were given"):
        creator.create_plugin("one", fields, trt.TensorRTPhase.RUNTIME)
    register(trt, source)
    try:
        plugin = copy(creator.create_plugin("one", fields, trt.TensorRTPhase.RUNTIME))
    finally:
        register(trt)
    assert kept
    desc = [SimpleNamespace(dims=(2, 256))]
    plugin.enqueue(desc, desc, [1], [2], 3, 4)
    assert source.enqueued == [([(2, 256)], [1], [2], 3, 4)]
    plugin.launcher = None
    with pytest.raises(EngineError, match=f"{op}: no kernels were found for this GPU"):
        plugin.enqueue(desc, desc, [1], [2], 3, 4)
    assert f"{op}: no kernels were found" in register(trt).failures[-1]


@pytest.mark.parametrize("act_quant", ["none", "ue8m0"])
def test_scratch_is_what_the_kernels_of_all_gpus_of_the_target_use(act_quant: str) -> None:
    """At V3.2 sizes; experts without quantized activations keep bf16 rows between their products."""
    tokens, experts, hidden, inner = 2048, 256, 7168, 2048
    weights = [(experts, 2 * inner, hidden), (experts, 32, 56), (experts, hidden, inner), (experts, 56, 16)]
    shapes = [(tokens, hidden), (tokens, 8), (tokens, 8), *weights]
    fields, kept = make_fields(stand_in_trt, {"act_quant": act_quant})
    plugin = creator_of(stand_in_trt, "MoeExperts").create_plugin("one", fields, stand_in_trt.TensorRTPhase.BUILD)
    registration = register(stand_in_trt, sms=(80, 90))
    asked = plugin.get_workspace_size([SimpleNamespace(max=shape) for shape in shapes], [])
    bound = SPECS["MoeExperts"].bind(shapes, {"act_quant": act_quant})
    assert kept
    assert asked == max(op_kernels("MoeExperts").plan(bound, sm).workspace_bytes for sm in (80, 90))
    plugin.get_workspace_size([SimpleNamespace(max=shape) for shape in [(1, hidden), (1, 8), (1, 8), *weights]], [])
    assert registration.workspaces == {"MoeExperts": asked}, "the most is kept"


@rtx
def test_at_run_time_the_plugin_gets_the_launcher_of_its_digest() -> None:
    trt = library.load("tensorrt-rtx")
    source = FakeSource()
    register(trt, source)
    try:
        creator = trt.get_plugin_registry().get_creator("BlockFp8Linear", "1", "seekforge")
        texts = {"act_quant": "ue8m0", "products": "fp8", "kernel_digest": "abc"}
        fields, kept = make_fields(trt, texts)
        plugin = creator.create_plugin("one", fields, trt.TensorRTPhase.RUNTIME)
    finally:
        register(trt)
    assert kept
    assert source.asked == [("BlockFp8Linear", {"act_quant": "ue8m0"}, "fp8", "abc")]
    attached = plugin.attach_to_context(None)
    desc = trt.PluginTensorDesc()
    desc.dims = trt.Dims((2, 256))
    attached.enqueue([desc], [desc], [1], [2], 3, 4)
    ((shapes, *rest),) = source.enqueued
    assert rest == [[1], [2], 3, 4]
    assert shapes == [(2, 256)] and type(shapes[0]) is tuple, "shapes are keys"
