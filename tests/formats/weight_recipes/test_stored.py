"""Forms of stored matrices: values equal an independent dequantization, through bindings.json and back."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import CheckpointError, ProgramError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.loader.jobs import Whole
from seekforge.formats.loader.loader import Loader, allocate
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.quantization.block_fp8 import quantize
from seekforge.formats.weight_recipes import (
    Recipe,
    dequantize_into,
    evaluate,
    for_rank,
    read_recipe,
    retarget,
    split,
)
from seekforge.formats.weight_recipes.stored import (
    BLOCK_FORMS,
    WeightForm,
    block_recipes,
    encode,
    kept_recipes,
    stored_parts,
    values_recipe,
)

FORMS: tuple[WeightForm, ...] = typing.get_args(WeightForm)
NAME = "model.layers.1.mlp.up_proj.weight"
SHAPE = (192, 256)


class Tensors:
    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def tensor(self, name: str) -> np.ndarray:
        return self._tensors[name]


def matrix(shape: tuple[int, int] = SHAPE) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return values * np.exp2(np.arange(shape[0]) % 7 - 3).astype(np.float32)[:, None]


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_an_independent_reader(form: WeightForm) -> None:
    torch = pytest.importorskip("torch")
    from tests.support.weight_forms import wide_weight

    from seekforge.exporter.models.shared.weights import to_torch

    made = encode(form, NAME, matrix())
    parts = stored_parts(form, NAME, SHAPE)
    assert {part.name: (part.dtype, part.shape) for part in parts} == {
        name: (next(word for word, dtype in NUMPY.items() if dtype == array.dtype), array.shape)
        for name, array in made.items()
    }
    theirs = wide_weight({name: to_torch(np.array(array)) for name, array in made.items()}, parts[0].name)
    recipe = read_recipe(values_recipe(form, NAME, SHAPE, "f32").to_dict())
    ours = evaluate(recipe, Tensors(made))
    assert torch.equal(torch.from_numpy(ours), theirs)
    error = np.sqrt(np.mean((ours - matrix()) ** 2) / np.mean(matrix() ** 2))
    assert error < (0.15 if "nvfp4" in form else 0.05), "the form holds something else"


@pytest.mark.parametrize("form", FORMS)
def test_kept_values_are_rounded_once_for_their_target(form: WeightForm) -> None:
    weight, scale = kept_recipes(form, NAME, SHAPE, "bf16")
    made = Tensors(encode(form, NAME, matrix()))
    wide = retarget(weight, activations="f32", fp8_dtype="f32")
    assert np.array_equal(evaluate(wide, made), evaluate(values_recipe(form, NAME, SHAPE, "f32"), made))
    narrow = evaluate(weight, made)
    assert np.array_equal(narrow, evaluate(wide, made).astype(NUMPY["bf16"]))
    assert scale.shape == (2, 2) and np.all(evaluate(read_recipe(scale.to_dict()), made) == 1)


def test_bf16_becomes_the_blocks_that_a_quantized_checkpoint_has() -> None:
    values = matrix().astype(NUMPY["bf16"])
    codes, scales = (evaluate(one, Tensors({NAME: values})) for one in block_recipes("bf16", NAME, SHAPE))
    stored, factors = quantize(values.astype(np.float32))
    assert np.array_equal(codes.view(np.uint8), stored.view(np.uint8)) and np.array_equal(scales, factors)
    back = np.empty(SHAPE, np.float32)
    dequantize_into(codes, scales, back)
    # half a step of three bits of mantissa, at the top of a block
    assert np.abs(back - matrix()).max() <= np.abs(matrix()).max() / 16


@pytest.mark.parametrize("form", [form for form in FORMS if form not in BLOCK_FORMS])
def test_other_forms_are_no_fp8_blocks(form: WeightForm) -> None:
    with pytest.raises(ProgramError, match="without rounding once more"):
        block_recipes(form, NAME, SHAPE)


def test_streaming_quantizes_as_evaluating_does_and_reads_once(tmp_path: Path) -> None:
    shape = (5 * 128 + 64, 4096)  # several pieces, the last block part full
    values = matrix(shape).astype(NUMPY["bf16"])
    write_shard(tmp_path / "model.safetensors", {NAME: values})
    codes, scales = block_recipes("bf16", NAME, shape)
    recipes = {"w": codes, "w_scale": scales, "bytes": retarget(codes, activations="bf16", fp8_dtype="i8")}
    with Checkpoint.open(tmp_path) as checkpoint:
        buffers = allocate(recipes)
        loader = Loader(checkpoint, recipes, buffers, scan=True)
        assert loader.total_bytes == values.nbytes
        loader.run()
        for name, recipe in recipes.items():
            expected = evaluate(recipe, checkpoint)
            assert np.array_equal(buffers[name].view(np.uint8), expected.view(np.uint8)), name


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_reads_its_part_of_bytes_alone(axis: int, tmp_path: Path) -> None:
    shape = (256, 512)
    write_shard(tmp_path / "model.safetensors", encode("fp8_blocks", NAME, matrix(shape)))
    weight = block_recipes("fp8_blocks", NAME, shape)[0]
    half = retarget(for_rank(split(weight, axis, 2), Parallelism(tp=2), 1), activations="f32", fp8_dtype="i8")
    with Checkpoint.open(tmp_path) as checkpoint:
        buffers = allocate({"w": half})
        loader = Loader(checkpoint, {"w": half}, buffers, scan=True)
        assert loader.total_bytes == 256 * 512 // 2
        loader.run()
        assert np.array_equal(buffers["w"], evaluate(half, checkpoint))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_quantizes_its_part_alone(axis: int, tmp_path: Path) -> None:
    """And not the whole matrix, once for its codes and once for its scales, on each of eight ranks."""
    shape = (256, 512)
    values = matrix(shape).astype(NUMPY["bf16"])
    write_shard(tmp_path / "model.safetensors", {NAME: values})
    whole = block_recipes("bf16", NAME, shape)
    with Checkpoint.open(tmp_path) as checkpoint:
        for rank in range(2):
            codes, scales = (for_rank(split(one, axis, 2), Parallelism(tp=2), rank) for one in whole)
            recipes = {"w": codes, "s": scales, "bytes": retarget(codes, activations="f32", fp8_dtype="i8")}
            buffers = allocate(recipes)
            loader = Loader(checkpoint, recipes, buffers, scan=True)
            assert {job.recipe.op for job in loader._jobs if isinstance(job, Whole)} == {"block_codes", "block_scales"}
            loader.run()
            for name, recipe in recipes.items():
                expected = evaluate(recipe, checkpoint)
                assert np.array_equal(buffers[name].view(np.uint8), expected.view(np.uint8)), (name, rank)


#: The scales of f32 that each form has, if not DeepSeek's.
SCALES: dict[WeightForm, str] = {
    "ct_fp8_blocks": f"{NAME}_scale",
    "ct_fp8_channel": f"{NAME}_scale",
    "ct_fp8_tensor": f"{NAME}_scale",
    "fp8_tensor": f"{NAME}_scale",
    "nvfp4": f"{NAME}_scale_2",
    "ct_nvfp4": f"{NAME}_global_scale",
}


@pytest.mark.parametrize("form", SCALES)
def test_a_scale_that_is_not_above_0_is_refused_as_it_is_read(form: WeightForm, tmp_path: Path) -> None:
    made = {name: np.array(array) for name, array in encode(form, NAME, matrix()).items()}
    made[SCALES[form]].reshape(-1)[-1] = 0  # of what divides, the values would be infinite
    write_shard(tmp_path / "model.safetensors", made)
    recipes = {"w": values_recipe(form, NAME, SHAPE, "f32")}
    with Checkpoint.open(tmp_path) as checkpoint:
        loader = Loader(checkpoint, recipes, allocate(recipes), scan=True)
        with pytest.raises(CheckpointError, match=rf"{SCALES[form]}'? holds 0.0 .*expected every scale above 0"):
            loader.run()


def test_a_block_of_zeros_has_a_scale_of_zero(tmp_path: Path) -> None:
    made = {name: np.array(array) for name, array in encode("nvfp4", NAME, matrix()).items()}
    made[f"{NAME}_scale"][0, 0] = 0
    write_shard(tmp_path / "model.safetensors", made)
    recipes = {"w": values_recipe("nvfp4", NAME, SHAPE, "f32")}
    with Checkpoint.open(tmp_path) as checkpoint:
        buffers = allocate(recipes)
        Loader(checkpoint, recipes, buffers, scan=True).run()
    assert not buffers["w"][0, :16].any() and buffers["w"][0, 16:].any()


FAULTS: dict[str, tuple[WeightForm, Callable[[dict[str, Any]], object]]] = {
    "nvfp4 of floats": ("nvfp4", lambda raw: raw["parts"][0].update(dtype="f32")),
    "nvfp4 with few scales": ("nvfp4", lambda raw: raw["parts"][1].update(shape=[192, 15])),
    "nvfp4 with two scales": ("nvfp4", lambda raw: raw["parts"][2].update(shape=[2])),
    "nvfp4 that divides by half": ("nvfp4", lambda raw: raw.update(params={"divides": 0.5})),
    "nvfp4 to bytes": ("nvfp4", lambda raw: raw.update(dtype="i8")),
    "rows of another number": ("ct_fp8_channel", lambda raw: raw["parts"][1].update(shape=[191, 1])),
    "rows of BF16": ("ct_fp8_channel", lambda raw: raw["parts"][0].update(dtype="bf16")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_recipes_are_refused(fault: str) -> None:
    form, change = FAULTS[fault]
    raw = values_recipe(form, NAME, SHAPE, "f32").to_dict()
    change(raw)
    with pytest.raises(ProgramError, match="malformed recipe"):
        read_recipe(raw)


@pytest.mark.parametrize("part", [{"dtype": "f8e4m3"}, {"shape": [2, 192, 256]}])
def test_blocks_are_made_of_wide_matrices_alone(part: dict[str, Any]) -> None:
    raw = block_recipes("bf16", NAME, SHAPE)[0].to_dict()
    raw["parts"][0] |= part
    with pytest.raises(ProgramError, match="malformed recipe"):
        read_recipe(raw)


def test_a_table_of_ones_is_bounded() -> None:
    params: dict[str, float] = {"rows": 1 << 13, "columns": 1 << 13}
    with pytest.raises(ProgramError, match="ones of 8192 rows"):
        read_recipe(Recipe("computed", (1 << 13, 1 << 13), "f32", tensor="ones", params=params).to_dict())
