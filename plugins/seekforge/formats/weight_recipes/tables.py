"""Tables that are computed and not read: cosines and sines of RoPE, the Hadamard matrix, what a rank has of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from seekforge.common.errors import ProgramError
from seekforge.formats.weight_recipes.recipe import Recipe


def computed(recipe: Recipe) -> np.ndarray:
    """Return the table of a `computed` recipe."""
    params = recipe.params
    if recipe.tensor == "hadamard":
        return hadamard(int(params["size"]))
    if recipe.tensor == "expert_map":
        if "ep_rank" not in params:
            raise ProgramError("bindings: expert_map is of no rank yet; apply for_rank first")
        per_rank = int(params["num_experts"]) // int(params["ep"])
        local = np.arange(int(params["num_experts"]), dtype=np.int32) - np.int32(params["ep_rank"] * per_rank)
        return np.where((local >= 0) & (local < per_rank), local, np.int32(-1))
    if recipe.tensor == "vocab_start":
        if "tp_rank" not in params:
            raise ProgramError("bindings: vocab_start is of no rank yet; apply for_rank first")
        return np.array([int(params["tp_rank"]) * (int(params["vocab_size"]) // int(params["tp"]))], np.int32)
    if recipe.tensor == "ones":
        return np.ones(recipe.shape, np.float32)
    if recipe.tensor not in ("rope_cos", "rope_sin"):
        raise ProgramError(f"bindings.json: unknown computed table {recipe.tensor!r}")
    return rope_rows(recipe, 0, recipe.shape[0])


def rope_rows(recipe: Recipe, start: int, stop: int) -> np.ndarray:
    """Return the rows of positions [start, stop) of a cosine or sine table."""
    params = recipe.params
    positions = np.arange(start, stop, dtype=np.float32)
    table = np.outer(positions, yarn_inv_freq(params))
    function = np.cos if recipe.tensor == "rope_cos" else np.sin
    function(table, out=table)  # in place: new memory costs more than the sines
    table *= np.float32(params["magnitude"])
    return table


def yarn_inv_freq(params: Mapping[str, float]) -> np.ndarray:
    """Return the YaRN-scaled inverse frequencies g_i, f32 [dim / 2] (spec §3.2; its values: spec §13.2)."""
    dim, theta, factor = int(params["dim"]), params["rope_theta"], params["factor"]
    original = params["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(params["beta_fast"])), 0)
    high = min(math.ceil(correction(params["beta_slow"])), dim - 1)
    width = 0.001 if low == high else high - low
    half = np.arange(dim // 2, dtype=np.float32)
    base = (1.0 / np.float32(theta) ** (2 * half / np.float32(dim))).astype(np.float32)
    if factor == 1:  # plain RoPE, to the bit
        return base
    ramp = np.clip((half - np.float32(low)) / np.float32(width), 0, 1)
    return (base / np.float32(factor) * ramp + base * (1 - ramp)).astype(np.float32)


def hadamard(size: int) -> np.ndarray:
    """Return the Sylvester Hadamard matrix times size^-0.5: H[i, j] = (−1)^popcount(i AND j), f32."""
    index = np.arange(size, dtype=np.uint32)
    ones = np.bitwise_count(index[:, None] & index)
    return (1.0 - 2.0 * (ones % 2)).astype(np.float32) * np.float32(size**-0.5)
