"""The shared fragments, exhaustively: e4m3 rounding and its scale in standard operators are exact, bit for bit."""

import onnx
import pytest
import torch
from torch import Tensor

from seekforge.plugins.block_fp8_linear.vectors import rounding_ties
from seekforge.plugins.functions.builder import Text, e4m3_table, fake_quantize
from seekforge.plugins.quant import E4M3_MAX_INVERSE
from seekforge.plugins.quant import fake_quantize as reference
from seekforge.plugins.testing import Draw, equal_bits, run_model


def run_fake_quantize(x: Tensor, bodies: str) -> Tensor:
    text = Text()
    text.add(f"y = Identity({fake_quantize(text, 'x', 'q_', dtype='f32', bodies=bodies)})")
    function = text.function("Round", ["x"], ["y"], [], "")
    node = onnx.helper.make_node("Round", ["x"], ["y"], domain="seekforge")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, tuple(x.shape)) for name in "xy"]
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("seekforge", 1)]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    y = torch.empty_like(x)
    run_model(model, {"x": x}, {"y": y})
    return y


def with_amax(amax: Tensor) -> Tensor:
    """One block of random values per entry of `amax`, whose largest magnitude it is."""
    fill = Draw(0).uniform(amax.numel(), 128, low=-1.0) * amax.unsqueeze(-1)
    fill[:, 17] = amax * (1 - 2 * (torch.arange(amax.numel()) % 2))
    return fill


def neighbors(values: Tensor, reach: int) -> Tensor:
    """Every f32 within `reach` steps of positive `values`."""
    bits = values.view(torch.int32).unsqueeze(-1) + torch.arange(-reach, reach + 1, dtype=torch.int32)
    return bits.flatten().view(torch.float32)


BF16 = (torch.arange(0x3586, 0x46EB, dtype=torch.int32) << 16).view(torch.float32)  # 1e-6 … 3e4
POWERS = torch.exp2(torch.arange(-30.0, 100.0))
PROBES = {
    "every bf16 as block maximum": with_amax(BF16),
    "around the powers of two": with_amax(neighbors(POWERS, 3)),
    "around 448 times a power": with_amax(neighbors(POWERS * 448, 3)),
    "around the powers times the reciprocal": with_amax(neighbors(POWERS / E4M3_MAX_INVERSE, 3)),
    "every tie": rounding_ties(),
    "every tie, scaled": torch.cat([rounding_ties() * 2.0**e for e in (-20, -7, 1, 15)]),
    "next to every tie": torch.cat([torch.nextafter(rounding_ties(), rounding_ties() * s) for s in (0.5, 2.0)]),
    "zeros": torch.zeros(3, 128),
}


@pytest.mark.parametrize("bodies", ["ort", "trt"])
@pytest.mark.parametrize("probe", PROBES)
def test_fake_quantize_is_exact(probe: str, bodies: str) -> None:
    x = PROBES[probe]
    assert equal_bits(run_fake_quantize(x, bodies) + 0.0, reference(x) + 0.0)  # + 0.0: -0 and 0 are one value here


def test_bytes_decode_to_torch_values() -> None:
    table = torch.from_numpy(e4m3_table())
    index = torch.arange(-128, 128).to(torch.int8)
    want = index.view(torch.float8_e4m3fn).float()
    assert torch.equal(table.nan_to_num(999.0), want.nan_to_num(999.0))


def test_constants_are_exact_and_shared() -> None:
    text = Text()
    assert text.f32(1e-4) == text.f32(1e-4) != text.f32(1e-3)
    assert text.i64(1) != text.ints(1) != text.i32(1)
    text.add(f"y = Add(x, {text.f32(0.1)})")
    function = text.function("F", ["x"], ["y"], [], "")
    values = [onnx.numpy_helper.to_array(n.attribute[0].t) for n in function.node if n.op_type == "Constant"]
    assert torch.tensor(0.1).item() in [float(v) for v in values if v.dtype == "float32"]
