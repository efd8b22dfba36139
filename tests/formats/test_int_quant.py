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
from seekforge.formats.quantization import int_codes
from seekforge.formats.quantization.int_codes import pack, quantize_rows
from seekforge.formats.weight_recipes import QuantizedOnce, dequantize, evaluate, evaluation, read_recipe, stack, take

WEIGHT = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)


class Source(dict):
    def tensor(self, name: str) -> np.ndarray:
        return self[name]


def squared_error(weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, block_size: int) -> float:
    return float(((codes * scales.repeat(block_size, axis=-1) - weight) ** 2).sum(dtype=np.float64))


@pytest.mark.parametrize(("bits", "most", "cut"), [(8, 127, 1.5), (4, 7, 1.9)])
def test_a_code_is_half_a_step_off_or_cut(bits: int, most: int, cut: float) -> None:
    codes, scales = quantize_rows(WEIGHT, bits, 32)
    assert codes.min() == -most - 1 and codes.max() == most
    step = np.abs(scales).repeat(32, axis=-1)
    error = np.abs(codes * scales.repeat(32, axis=-1) - WEIGHT)
    assert (error <= step * cut * 1.05).all() and (error <= step * 0.55).mean() > 0.97


def largest_on_lowest(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the scale that puts the value of largest magnitude on the lowest code, as llama.cpp's Q4_0 does."""
    blocks, lowest = weight.reshape(-1, block_size), -(2 ** (bits - 1))
    at = np.abs(blocks).argmax(-1)[:, None]
    scales = np.take_along_axis(blocks, at, 1) / lowest
    codes = np.clip(np.rint(blocks / scales), lowest, -lowest - 1)
    return codes.reshape(weight.shape), scales.reshape(len(weight), -1)


@pytest.mark.parametrize("block_size", (32, 64, 128))
@pytest.mark.parametrize(("bits", "gain"), [(8, 0.03), (4, 0.08)])
@pytest.mark.parametrize("is_fp8", (False, True))
def test_the_search_takes_a_part_off_the_squared_error(bits: int, gain: float, block_size: int, is_fp8: bool) -> None:
    import ml_dtypes

    weight = np.random.default_rng(2).standard_normal((512, 128)).astype(np.float32)
    if is_fp8:
        weight = (weight * 64).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 64
    plain = squared_error(weight, *largest_on_lowest(weight, bits, block_size), block_size)
    found = squared_error(weight, *quantize_rows(weight, bits, block_size), block_size)
    assert found < (1 - gain) * plain
    if is_fp8:
        return  # of two values of one magnitude and other signs, which are common there, either may be the lowest code
    searched, before = (
        ((codes * scales.repeat(block_size, axis=-1) - weight) ** 2).reshape(-1, block_size).sum(-1)
        for codes, scales in (quantize_rows(weight, bits, block_size), largest_on_lowest(weight, bits, block_size))
    )
    assert (searched <= before * 1.005).all()  # no block is worse, as far as sums in f32 tell


def test_a_scale_is_the_best_one_for_its_codes() -> None:
    codes, scales = quantize_rows(WEIGHT, 4, 32)
    least = squared_error(WEIGHT, codes, scales, 32)
    for factor in (0.999, 1.001):
        assert squared_error(WEIGHT, codes, scales * np.float32(factor), 32) > least


def test_many_rows_are_quantized_as_each_of_them() -> None:
    wide = np.random.default_rng(3).standard_normal((40, 4096)).astype(np.float32)
    codes, scales = quantize_rows(wide, 4, 64)
    for row in (0, 15, 16, 39):
        one = quantize_rows(wide[row], 4, 64)
        assert np.array_equal(codes[row], one[0]) and np.array_equal(scales[row], one[1])


def test_threads_give_the_codes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((1100, 1024)).astype(np.float32)
    made = []
    for cores in (1, 3):
        monkeypatch.setattr(int_codes, "usable_cores", lambda cores=cores: cores)
        made.append(quantize_rows(weight, 4, 32))
    assert all(np.array_equal(one, other) for one, other in zip(*made, strict=True))


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


def test_codes_and_scales_of_a_weight_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append(bits)
        return quantize_rows(weight, bits, block_size)

    monkeypatch.setattr(evaluation, "quantize_rows", counted)
    source = QuantizedOnce(Source(w=WEIGHT, v=WEIGHT[:64]))
    codes, scales = quantized(take("w", WEIGHT.shape, "f32"), 4, 32)
    read = read_recipe(scales.to_dict())  # as from bindings.json, where no part is shared
    others = quantized(take("v", (64, 64), "f32"), 4, 32)
    assert np.array_equal(evaluate(codes, source), quantize_rows(WEIGHT, 4, 32)[0])
    evaluate(others[0], source)
    assert np.array_equal(evaluate(read, source), quantize_rows(WEIGHT, 4, 32)[1])
    assert len(calls) == 2
    assert np.array_equal(evaluate(read, source), quantize_rows(WEIGHT, 4, 32)[1]) and len(calls) == 3  # not kept


def test_codes_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append(len(weight))
        return quantize_rows(weight, bits, block_size)

    monkeypatch.setattr(evaluation, "quantize_rows", counted)
    source = QuantizedOnce(Source(w=WEIGHT[:64], v=WEIGHT[:64]), room=64 * 64 + 64 * 2 * 4)
    fits, beyond = (quantized(take(name, (64, 64), "f32"), 8, 32) for name in "wv")
    want = quantize_rows(WEIGHT[:64], 8, 32)
    for _ in range(2):
        for one, expected in (*zip(fits, want, strict=True), *zip(beyond, want, strict=True)):
            assert np.array_equal(evaluate(one, source), expected)
    assert len(calls) == 3


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


def test_a_weight_may_be_stored_otherwise_than_its_kind() -> None:
    how = Quantization(
        precision="int4",
        block_size=32,
        kinds={"o_proj": "int4", "lm_head": "int8", "gate": "f32"},
        weights={"layers.1.self_attn.o_proj.weight": "int8", "lm_head.weight": "f32"},
    )
    assert [how.bits(f"layers.{i}.self_attn.o_proj.weight") for i in (0, 1, 11)] == [4, 8, 4]
    assert [how.stored_in(i, "o_proj") for i in (0, 1, 11)] == ["int4", "int8", "int4"]
    assert how.bits("lm_head.weight") is None and how.stored_in(4, "lm_head") == "f32"
    assert how.stored_in(0, "gate") == how.stored_in(0, "norm") == "f32"
    assert how.smallest == "int4"


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
