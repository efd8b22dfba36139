"""Recipes: evaluation against NumPy, and the account of every checkpoint element."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest

from seekforge.common.errors import ProgramError
from seekforge.formats.weight_recipes import (
    FP8_VALUES,
    QuantizedOnce,
    Recipe,
    cast,
    concat,
    coverage,
    dequantize,
    evaluate,
    evaluate_into,
    hadamard,
    nvfp4_rows,
    nvfp4_scales,
    read_recipe,
    reshape,
    retarget,
    rope_table,
    slice_,
    stack,
    take,
    transpose,
    yarn_inv_freq,
)

ROPE = {
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "magnitude": 1.0,
}


class Source:
    """Tensors by name; counts reads."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors

    def tensor(self, name: str) -> np.ndarray:
        return self.tensors[name]


@pytest.fixture
def source() -> Source:
    rng = np.random.default_rng(0)
    f8 = np.dtype(ml_dtypes.float8_e4m3fn)

    def weight(n: int, k: int) -> np.ndarray:
        return rng.standard_normal((n, k), np.float32).astype(f8)

    return Source(
        {
            "a": weight(256, 384),
            "a_scale": np.exp2(rng.integers(-8, 0, (2, 3))).astype(np.float32),
            "b": weight(192, 384),
            "b_scale": np.exp2(rng.integers(-8, 0, (2, 3))).astype(np.float32),
            "n": rng.standard_normal(384, np.float32).astype(ml_dtypes.bfloat16),
            "bias": rng.standard_normal(16, np.float32),
        }
    )


def fp8(name: str, n: int, k: int) -> tuple[Recipe, Recipe]:
    scale = (-(-n // 128), -(-k // 128))
    return take(name, (n, k), "f8e4m3"), take(f"{name}_scale", scale, "f32")


def dequantized(source: Source, name: str) -> np.ndarray:
    weight = source.tensor(name).astype(np.float32)
    scale = source.tensor(f"{name}_scale").repeat(128, 0).repeat(128, 1)
    return weight * scale[: weight.shape[0], : weight.shape[1]]


def test_take_slice_and_reshape_do_not_copy(source: Source) -> None:
    weight, _ = fp8("a", 256, 384)
    recipe = slice_(reshape(weight, (2, 128, 384)), 1, 0, 64)
    got = evaluate(recipe, source)
    assert got.shape == recipe.shape == (2, 64, 384)
    assert np.shares_memory(got, source.tensor("a"))


def test_concat_stack_transpose_and_dequantize_equal_numpy(source: Source) -> None:
    (a, a_scale), (b, b_scale) = fp8("a", 256, 384), fp8("b", 192, 384)
    both = np.concatenate([dequantized(source, "a"), dequantized(source, "b")])
    recipe = dequantize(concat([a, b]), concat([a_scale, b_scale]), "f32")
    assert np.array_equal(evaluate(recipe, source), both)
    assert np.array_equal(evaluate(transpose(recipe, (1, 0)), source), both.T)
    pair = dequantize(stack([a, a]), stack([a_scale, a_scale]), "f32")
    assert np.array_equal(evaluate(pair, source), np.stack([dequantized(source, "a")] * 2))
    out = np.empty((2, 384, 256), np.float32)
    evaluate_into(transpose(pair, (0, 2, 1)), source, out)
    assert np.array_equal(out[1], dequantized(source, "a").T)


def test_cast_and_retarget_keep_f32_whole(source: Source) -> None:
    norm = take("n", (384,), "bf16")
    assert cast(norm, "bf16") is norm
    assert np.array_equal(evaluate(retarget(norm, activations="f32", fp8_dtype="f8e4m3"), source), source.tensor("n"))
    weight, scale = fp8("a", 256, 384)
    odd = Source({**source.tensors, "a_scale": source.tensor("a_scale") * np.float32(1.001)})
    rounded = dequantize(weight, scale, "bf16")
    whole = retarget(slice_(reshape(rounded, (2, 128, 384)), 1, 0, 64), activations="f32", fp8_dtype="f8e4m3")
    assert whole.dtype == "f32"
    assert np.array_equal(evaluate(whole, odd), dequantized(odd, "a").reshape(2, 128, 384)[:, :64])
    stored = retarget(weight, activations="f32", fp8_dtype="i8")
    assert np.array_equal(evaluate(stored, source), source.tensor("a").view(np.int8))


def test_a_recipe_survives_json(source: Source) -> None:
    weight, scale = fp8("a", 256, 384)
    recipe = slice_(reshape(dequantize(weight, scale, "bf16"), (2, 128, 384)), 1, 64, 128)
    assert read_recipe(recipe.to_dict()) == recipe
    assert read_recipe(rope_table("rope_cos", num_positions=8, dim=64, rope=ROPE).to_dict()).params["factor"] == 40


@pytest.mark.parametrize("raw", ({}, {"op": "take", "shape": [1], "dtype": "f32", "parts": 3}))
def test_a_malformed_recipe_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(ProgramError, match="malformed recipe"):
        read_recipe(raw)


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        (nvfp4_rows(take("a", (256, 384), "f8e4m3")), {"dtype": "bf16"}),
        (nvfp4_rows(take("a", (256, 384), "f8e4m3")), {"shape": [256, 376]}),
        (nvfp4_scales(take("a_scale", (2, 3), "f32")), {"dtype": "bf16"}),
        (nvfp4_scales(take("a_scale", (2, 3), "f32")), {"shape": []}),
    ],
)
def test_nvfp4_is_made_of_fp8_rows_in_blocks_of_16_alone(recipe: Recipe, part: dict[str, object]) -> None:
    raw = recipe.to_dict()
    assert read_recipe(raw) == recipe
    raw["parts"][0] |= part
    with pytest.raises(ProgramError, match="malformed recipe"):
        read_recipe(raw)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ProgramError, match="out of range"):
        slice_(take("a", (4, 4), "f32"), 0, 2, 5)
    with pytest.raises(ProgramError, match="changes the number"):
        reshape(take("a", (4, 4), "f32"), (3, 5))


def test_inverse_frequencies_are_those_of_the_spec() -> None:
    # spec §13.2, every fourth
    expected = {0: 1, 4: 0.31622776, 8: 0.1, 12: 0.026879361, 16: 0.0055, 20: 7.905694e-4, 24: 2.5e-5, 31: 3.3338038e-6}
    got = yarn_inv_freq({"dim": 64, **ROPE})
    for i, value in expected.items():
        assert got[i] == pytest.approx(value, rel=2e-7)
    assert got.dtype == np.float32


def test_rope_tables_are_the_cosine_of_an_f32_angle() -> None:
    cos = evaluate(rope_table("rope_cos", num_positions=131072, dim=64, rope=ROPE), Source({}))
    sin = evaluate(rope_table("rope_sin", num_positions=131072, dim=64, rope=ROPE), Source({}))
    angle = np.float32(131071) * yarn_inv_freq({"dim": 64, **ROPE})
    assert np.array_equal(cos[131071], np.cos(angle))
    assert np.allclose(cos**2 + sin**2, 1, atol=1e-6)


def test_hadamard_is_the_one_of_the_spec() -> None:
    h = hadamard(128)
    v = np.arange(128, dtype=np.float32) - np.float32(63.5)
    got = v @ h
    expected = np.zeros(128, np.float32)
    expected[[1, 2, 4, 8, 16, 32, 64]] = [-5.65685, -11.31371, -22.62742, -45.25483, -90.50967, -181.01934, -362.03867]
    assert np.allclose(got, expected, atol=1e-3)


def test_fp8_values_are_those_of_the_spec() -> None:
    # spec §13.1, byte -> value
    expected = {
        0x38: 1.0,
        0x3A: 1.25,
        0x01: 2**-9,
        0x2A: 0.3125,
        0x58: 16,
        0x6D: 104,
        0x78: 256,
        0x7E: 448,
        0xC5: -3.25,
    }
    for byte, value in expected.items():
        assert FP8_VALUES[byte] == value
    assert np.isnan(FP8_VALUES[[0x7F, 0xFF]]).all()


def test_coverage_counts_parts_once_and_declares_sharing() -> None:
    weight, scale = take("kv", (512, 128), "f8e4m3"), take("kv_scale", (4, 1), "f32")
    heads = reshape(dequantize(weight, scale, "bf16"), (2, 256, 128))
    read = coverage(
        {
            "w_uk": slice_(heads, 1, 0, 128),
            "w_uv": slice_(heads, 1, 128, 256),
            "embed": take("embed", (10, 4), "bf16"),
            "mtp:embed": take("embed", (10, 4), "bf16"),
        }
    )
    assert read.used == {"kv": 512 * 128, "kv_scale": 4, "embed": 40}
    assert read.shared == {"kv_scale": ["w_uk", "w_uv"], "embed": ["embed", "mtp:embed"]}


def test_coverage_shows_what_is_left_out() -> None:
    weight = take("kv", (512, 128), "f8e4m3")
    read = coverage({"w_uk": slice_(reshape(weight, (2, 256, 128)), 1, 0, 100)})
    assert read.used == {"kv": 2 * 100 * 128}


def test_parts_that_overlap_are_refused() -> None:
    weight = take("w", (512, 128), "f8e4m3")
    with pytest.raises(ProgramError, match="overlapping parts"):
        coverage({"a": slice_(weight, 0, 0, 300), "b": slice_(weight, 0, 200, 512)})


def test_a_weight_is_widened_in_place() -> None:
    """Beside the result there is no second one of its size."""
    table = np.random.default_rng(0).standard_normal((1000, 1000), np.float32).astype(ml_dtypes.bfloat16)
    recipe = cast(take("table", table.shape, "bf16"), "f32")
    out = np.empty(recipe.shape, np.float32)
    tracemalloc.start()
    try:
        evaluate_into(recipe, Source({"table": table}), out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (out == table.astype(np.float32)).all()
    assert peak < out.nbytes / 4


class Rows(Source):
    """A source that reads rows; counts their bytes."""

    num_bytes = 0

    def tensor(self, name: str) -> np.ndarray:
        self.num_bytes += self.tensors[name].nbytes
        return self.tensors[name]

    def dtype(self, name: str) -> str:
        return {np.dtype(np.float32): "f32", np.dtype(ml_dtypes.bfloat16): "bf16"}.get(
            self.tensors[name].dtype, "f8e4m3"
        )

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        self.num_bytes += out.nbytes
        out[...] = self.tensors[name][start : start + len(out)]


@pytest.mark.parametrize(
    ("recipe", "num_bytes"),
    [
        (slice_(take("a", (256, 384), "f8e4m3"), 0, 64, 192), 128 * 384),
        (slice_(take("a", (256, 384), "f8e4m3"), 1, 64, 192), 256 * 384),
        (stack([take("a", (256, 384), "f8e4m3"), take("a", (256, 384), "f8e4m3")]), 2 * 256 * 384),
        (transpose(take("a", (256, 384), "f8e4m3"), (1, 0)), 256 * 384),
        (cast(slice_(take("n", (384,), "bf16"), 0, 7, 9), "f32"), 4),
        (take("n", (384,), "f32"), 768),
        (dequantize(*fp8("b", 192, 384), "f32"), 192 * 384 + 24),
    ],
)
def test_of_rows_no_others_are_read_and_values_are_the_same(source: Source, recipe: Recipe, num_bytes: int) -> None:
    rows = Rows(source.tensors)
    found = evaluate(recipe, rows)
    assert rows.num_bytes == num_bytes
    assert found.tobytes() == np.ascontiguousarray(evaluate(recipe, source)).tobytes()
    out = np.zeros_like(found)
    evaluate_into(recipe, rows, out)
    assert out.tobytes() == found.tobytes()


def test_of_rows_no_others_are_read_where_weights_are_quantized_once(source: Source) -> None:
    rows = Rows(source.tensors)
    evaluate(slice_(take("a", (256, 384), "f8e4m3"), 0, 64, 192), QuantizedOnce(rows))
    assert rows.num_bytes == 128 * 384
