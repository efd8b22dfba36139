"""Specializing retypes exactly what the choices say."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from seekforge.common.errors import ProgramError
from seekforge.exporter.program.specialize import specialize
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import CANONICAL, Specialization
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, SPECS

CPU = Specialization(activations="f32", fp8_storage="float8", kv_format="f32", bodies="ort")
PORTABLE = Specialization(activations="bf16", fp8_storage="int8", kv_format="bf16", bodies="trt")
PLUGIN = Specialization(activations="bf16", fp8_storage="float8", kv_format="fp8_ds", bodies="trt")


@pytest.fixture(scope="module")
def canonical(tiny_programs: dict[str, Path]) -> onnx.ModelProto:
    return onnx.load(tiny_programs["fp8"] / "model.onnx")


def elem_types(model: onnx.ModelProto) -> set[int]:
    values = [*model.graph.input, *model.graph.output]
    casts = [a.i for node in model.graph.node for a in node.attribute if node.op_type == "Cast" and a.name == "to"]
    return {value.type.tensor_type.elem_type for value in values} | set(casts)


@pytest.mark.parametrize("how", (CANONICAL, CPU, PORTABLE), ids=lambda how: f"{how.activations}-{how.fp8_storage}")
def test_a_specialized_program_passes_the_checker(
    canonical: onnx.ModelProto, tiny_config: ModelConfig, how: Specialization
) -> None:
    model = specialize(canonical, how, tiny_config)
    attach(model, how)
    onnx.checker.check_model(model, full_check=True)


def test_f32_leaves_no_bf16_anywhere(canonical: onnx.ModelProto, tiny_config: ModelConfig) -> None:
    assert TensorProto.BFLOAT16 in elem_types(canonical)
    model = specialize(canonical, CPU, tiny_config)
    assert TensorProto.BFLOAT16 not in elem_types(model)
    assert not any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer)


def test_int8_storage_leaves_no_float8_anywhere(canonical: onnx.ModelProto, tiny_config: ModelConfig) -> None:
    model = specialize(canonical, PORTABLE, tiny_config)
    assert TensorProto.FLOAT8E4M3FN not in elem_types(model)
    assert TensorProto.INT8 in elem_types(model)


def test_fp8_ds_gives_caches_their_byte_layouts(canonical: onnx.ModelProto, tiny_config: ModelConfig) -> None:
    model = specialize(canonical, PLUGIN, tiny_config)
    found = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    record = tiny_config.kv_lora_rank + 4 * tiny_config.kv_lora_rank // 128 + 2 * tiny_config.qk_rope_head_dim
    for name in ("latent_cache.0", "latent_cache_out.0"):
        assert found[name].elem_type == TensorProto.INT8
        assert [dim.dim_param or dim.dim_value for dim in found[name].shape.dim] == ["NB", 64, record]
    assert [dim.dim_param or dim.dim_value for dim in found["index_cache.3"].shape.dim] == ["NB", 64 * 132]
    formats = {a.s for node in model.graph.node for a in node.attribute if a.name in ("kv_format", "index_format")}
    assert formats == {b"fp8_ds"}


def test_the_canonical_program_is_left_alone(canonical: onnx.ModelProto, tiny_config: ModelConfig) -> None:
    before = canonical.SerializeToString(deterministic=True)
    specialize(canonical, CPU, tiny_config)
    assert canonical.SerializeToString(deterministic=True) == before


def test_nodes_of_one_operator_must_agree(canonical: onnx.ModelProto, tiny_config: ModelConfig) -> None:
    model = specialize(canonical, CPU, tiny_config)
    nodes = [node for node in model.graph.node if node.op_type == "DsaAttention"]
    next(a for a in nodes[1].attribute if a.name == "scale").f = 0.5
    with pytest.raises(ProgramError, match="DsaAttention: attribute scale"):
        attach(model, CPU)


def test_what_is_no_program_is_refused(tiny_config: ModelConfig) -> None:
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    with pytest.raises(ProgramError, match="no cache input"):
        specialize(empty, CPU, tiny_config)


def test_every_operator_but_the_collective_that_of_gpu_builds_and_dense_attention_is_used_by_one_rank(
    canonical: onnx.ModelProto,
) -> None:
    others = {"SumRanks", ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, "MlaCacheWrite", "MlaAttention"}
    assert {node.op_type for node in canonical.graph.node if node.domain} == set(SPECS) - others
