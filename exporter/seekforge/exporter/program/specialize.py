"""Make a canonical program concrete for a target: dtypes of activations, FP8 weights and caches.

The canonical program is typed bf16 with float8 weights. Where a target computes in f32, every bf16 type
becomes f32 (the casts that rounded become no-ops); where it has no float8, weights become int8 bytes; caches
get the dtype and layout of `kv_format`. Bodies are attached after this, generated for the same choices.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from seekforge.common.dtypes import NUMPY, ONNX
from seekforge.common.errors import ProgramError
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.operator import DOMAIN
from seekforge.plugins.quant import INDEX_KEY_BYTES, latent_record_bytes

_CACHE_KINDS = ("latent_cache", "index_cache")


def specialize(model: onnx.ModelProto, how: Specialization, config: ModelConfig) -> onnx.ModelProto:
    """Return a retyped copy of a canonical graph, without functions.

    Args:
        model: canonical graph; functions in it are dropped.
        how: the choices.
        config: sizes of the cache records.

    Raises:
        ProgramError: the graph has no bf16 or cache to retype: it is not a canonical program.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.functions[:]
    graph = result.graph
    # inner types are derived again from the new inputs and casts
    del graph.value_info[:]
    retyped = sum(_retype(value, how, config) for value in (*graph.input, *graph.output))
    if not any(_is_cache(value.name) for value in graph.input):
        raise ProgramError("specialize: the graph has no cache input; expected a program written by 'seekforge export'")
    for tensor in graph.initializer:
        _retype_constant(tensor, how)
    for node in graph.node:
        if node.op_type == "Cast" and how.activations == "f32":
            attribute = next(a for a in node.attribute if a.name == "to")
            if attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        elif node.domain == DOMAIN:
            _set_formats(node, how)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _retype_constant(attribute.t, how)
    if how.activations == "f32" and not retyped:
        raise ProgramError("specialize: no bf16 input or output to retype; expected a canonical program")
    return result


def _is_cache(name: str) -> bool:
    return name.partition(".")[0].removesuffix("_out") in _CACHE_KINDS


def _retype(value: onnx.ValueInfoProto, how: Specialization, config: ModelConfig) -> int:
    tensor = value.type.tensor_type
    if _is_cache(value.name):
        _retype_cache(value, how, config)
        return 1
    if tensor.elem_type == TensorProto.BFLOAT16 and how.activations == "f32":
        tensor.elem_type = TensorProto.FLOAT
        return 1
    if tensor.elem_type == TensorProto.FLOAT8E4M3FN:
        tensor.elem_type = ONNX[how.fp8_dtype]
        return 1
    return 0


def _retype_cache(value: onnx.ValueInfoProto, how: Specialization, config: ModelConfig) -> None:
    is_latent = value.name.startswith("latent_cache")
    if how.kv_format == "fp8_ds":
        record = latent_record_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        shape = ["NB", BLOCK_SIZE, record] if is_latent else ["NB", BLOCK_SIZE * INDEX_KEY_BYTES]
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.INT8, shape))
    else:
        value.type.tensor_type.elem_type = ONNX[how.kv_format]


def _retype_constant(tensor: TensorProto, how: Specialization) -> None:
    if tensor.data_type == TensorProto.BFLOAT16 and how.activations == "f32":
        values = numpy_helper.to_array(tensor).astype(NUMPY["f32"])
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _set_formats(node: onnx.NodeProto, how: Specialization) -> None:
    for attribute in node.attribute:
        if attribute.name in ("kv_format", "index_format"):
            attribute.s = how.kv_format.encode()
