"""Linears with codes for weights: the same numbers as ONNX Runtime's MatMulNBits, and a whole model of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from tests.support.ort_session import open_session

from seekforge.exporter.models.shared.coded import CodedLinear
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.int_quant import Quantization
from seekforge.formats.numerics import EXACT
from seekforge.formats.quantization.int_codes import pack, quantize_rows


def matmul_nbits(x: np.ndarray, weight: np.ndarray, bits: int) -> np.ndarray:
    n, k = weight.shape
    codes, scales = quantize_rows(weight, bits, 32)
    attrs = {"K": k, "N": n, "bits": bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attrs)
    constants = [
        onnx.numpy_helper.from_array(pack(codes, bits, 32), "codes"),
        onnx.numpy_helper.from_array(scales, "scales"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, x.shape)],
        [value("y", onnx.TensorProto.FLOAT, [len(x), n])],
        constants,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = open_session(model.SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("rows", (1, 5))
def test_the_product_is_that_of_onnx_runtime(bits: int, rows: int) -> None:
    draw = np.random.default_rng(bits + rows)
    weight = draw.standard_normal((96, 256)).astype(np.float32)
    x = draw.standard_normal((rows, 256)).astype(np.float32)
    x[0, 32:64] = 0
    linear = CodedLinear(256, 96, 32)
    codes, scales = (torch.from_numpy(part) for part in quantize_rows(weight, bits, 32))
    linear.load_state_dict({"weight": codes, "weight_scale": scales}, assign=True)
    want = linear(torch.from_numpy(x)).numpy()
    # without the rounding of x this is 5e-3
    assert np.abs(matmul_nbits(x, weight, bits) - want).max() < 1e-5 * want.std()


def test_a_model_with_codes_differs_by_what_rounding_costs(tiny_source: Checkpoint, tiny_config: ModelConfig) -> None:
    prompt = list(range(20, 40))
    kinds = ("qkv_a_proj", "q_b_proj", "wq_b", "o_proj", "gate_up_proj", "down_proj", "experts", "lm_head")
    exact = TorchSession(Settings(tiny_config, EXACT), tiny_source).prefill(prompt)["logits"]
    error = {}
    for precision in ("int8", "int4"):
        how = Quantization(precision=precision, block_size=32, kinds=dict.fromkeys(kinds, precision))
        session = TorchSession(Settings(tiny_config, EXACT, quantization=how), tiny_source)
        assert session.module().lm_head.weight.dtype == torch.int8  # pyright: ignore
        logits = session.prefill(prompt)["logits"]
        error[precision] = float((logits - exact).abs().median() / exact.std())
    assert 1e-4 < error["int8"] < 0.05
    assert error["int8"] < error["int4"] < 0.5
