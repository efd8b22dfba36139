"""Codes and scales: what is lost, how they are packed, and recipes of them."""

import numpy as np
import pytest

from seekforge.common.errors import ProgramError
from seekforge.formats.int_quant import (
    Quantization,
    dequantized,
    kind_of,
    packed,
    quantized,
    quantized_recipes,
)
from seekforge.formats.quantization.int_codes import pack, quantize_rows
from seekforge.formats.weight_recipes import dequantize, evaluate, read_recipe, stack, take

WEIGHT = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)


class Source(dict):
    def tensor(self, name: str) -> np.ndarray:
        return self[name]


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_a_code_is_at_most_half_a_step_off(bits: int, most: int) -> None:
    codes, scales = quantize_rows(WEIGHT, bits, 32)
    assert codes.min() == -most - 1 and codes.max() == most
    step = np.abs(scales).repeat(32, axis=-1)
    error = np.abs(codes * scales.repeat(32, axis=-1) - WEIGHT)
    # the value opposite to the largest one may be cut by up to one step
    assert (error <= step * 1.0001).all() and (error <= step * 0.5001).mean() > 0.99
    largest = np.abs(WEIGHT.reshape(-1, 32)).argmax(-1)
    assert np.take_along_axis(error.reshape(-1, 32), largest[:, None], 1).max() < 1e-6


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_rows(np.zeros((2, 64), np.float32), 4, 32)
    assert not codes.any() and not scales.any()


def test_two_codes_share_a_byte_the_first_one_below() -> None:
    codes = np.array([[-8, 7, 0, 1]], np.int8)
    assert pack(codes, 4, 4).tolist() == [[[0xF0, 0x98]]]
    assert pack(codes, 8, 2).tolist() == [[[120, 135], [128, 129]]]


def test_recipes_give_codes_and_scales_of_the_dequantized_weight() -> None:
    import ml_dtypes

    draw = np.random.default_rng(1)
    source = Source()
    pairs = []
    for e in range(2):
        source[f"w{e}"] = draw.standard_normal((256, 128)).astype(ml_dtypes.float8_e4m3fn)
        source[f"s{e}"] = draw.random((2, 1)).astype(np.float32)
        pairs.append((take(f"w{e}", (256, 128), "f8e4m3"), take(f"s{e}", (2, 1), "f32")))
    weights, scales = (stack(parts) for parts in zip(*pairs, strict=True))
    codes, code_scales = quantized(dequantized(weights, scales), 4, 32)
    assert (codes.op, codes.shape, code_scales.shape) == ("stack", (2, 256, 128), (2, 256, 4))
    real = evaluate(dequantize(*pairs[1], "f32"), source)
    want = quantize_rows(real, 4, 32)
    assert np.array_equal(evaluate(codes, source)[1], want[0])
    assert np.array_equal(evaluate(code_scales, source)[1], want[1])
    ready = packed(codes, 4, 32)
    assert ready.shape == (2, 256, 4, 16)
    assert np.array_equal(evaluate(ready, source)[1], pack(want[0], 4, 32))
    assert read_recipe(ready.to_dict()) == ready


def test_a_row_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ProgramError, match="no whole blocks of 32"):
        quantized(take("w", (4, 80), "f32"), 8, 32)


def test_only_the_kinds_that_are_named_become_codes() -> None:
    how = Quantization(precision="int4", block_size=32, kinds={"o_proj": "int4", "lm_head": "int8", "wq_b": "f32"})
    pair = {"weight": take("a", (128, 128), "f8e4m3"), "weight_scale": take("b", (1, 1), "f32")}
    recipes = {
        f"layers.0.self_attn.{kind}.{name}": r for kind in ("o_proj", "indexer.wq_b") for name, r in pair.items()
    }
    recipes["lm_head.weight"] = take("c", (256, 128), "bf16")
    found = quantized_recipes(recipes, how)
    assert found["layers.0.self_attn.indexer.wq_b.weight"] == pair["weight"]
    assert found["layers.0.self_attn.o_proj.weight"].params == {"bits": 4, "block_size": 32}
    assert found["lm_head.weight"].params["bits"] == 8
    assert found["lm_head.weight_scale"].shape == (256, 4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers.3.self_attn.o_proj.weight_scale", "o_proj"),
        ("layers.3.mlp.experts.w13", "experts"),
        ("layers.3.mlp.shared_experts.down_proj.weight", "down_proj"),
        ("layers.3.self_attn.w_uk", "w_uk"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_kinds_are_parts_of_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind
