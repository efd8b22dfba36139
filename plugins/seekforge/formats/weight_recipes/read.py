"""Recipes of bindings.json are read: a node has the fields of its op, and the shape and dtype that its parts make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from seekforge.common.dtypes import NUMPY, itemsize
from seekforge.common.errors import ProgramError
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.quantization.nvfp4 import BLOCK as NVFP4_BLOCK
from seekforge.formats.weight_recipes.constructors import (
    as_bytes,
    block_codes,
    block_scales,
    concat,
    dequantize,
    dequantize_nvfp4,
    nvfp4_rows,
    nvfp4_scales,
    reshape,
    scale_rows,
    slice_,
    stack,
    transpose,
)
from seekforge.formats.weight_recipes.recipe import Recipe

#: Elements of any tensor are fewer.
_MOST = 2**60
_FLOATS = ("f32", "bf16")

_ROPE_PARAMS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "magnitude",
)

#: Numbers that a computed table depends on, and of which of them its shape follows.
_TABLE_PARAMS = {
    "rope_cos": ("num_positions", "dim", *_ROPE_PARAMS),
    "rope_sin": ("num_positions", "dim", *_ROPE_PARAMS),
    "hadamard": ("size",),
    "expert_map": ("num_experts", "ep"),
    "vocab_start": ("vocab_size", "tp"),
    "ones": ("rows", "columns"),
}
#: What a table of one rank has besides: which rank that is.
_RANK_PARAMS = {"expert_map": "ep_rank", "vocab_start": "tp_rank"}
#: Fields beside op, shape, dtype and parts, and which of them each op has, in the same order.
_OPTIONAL = ("tensor", "axis", "start", "stop", "perm", "params")
_FIELDS = {"take": ["tensor"], "computed": ["tensor", "params"], "slice": ["axis", "start", "stop"], "concat": ["axis"]}
_FIELDS |= {"stack": ["axis"], "split": ["axis"], "transpose": ["perm"]}
_FIELDS |= {op: [] for op in ("reshape", "dequantize", "cast", "bytes", "block_codes", "block_scales", "scale_rows")}
_FIELDS |= {op: [] for op in ("nvfp4_rows", "nvfp4_scales")}
_FIELDS |= {op: ["params"] for op in ("codes", "code_scales", "packed", "nvfp4")}
_TAKE = {"op", "shape", "dtype", "tensor"}
#: Parts of the ops that have not one; concat and stack have any number.
_NUM_PARTS = {"take": 0, "computed": 0, "dequantize": 2, "scale_rows": 2, "nvfp4": 3}


def read_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from bindings.json.

    Raises:
        ProgramError: a field is missing or malformed.
    """
    try:
        if raw.keys() == _TAKE:  # most are leaves like this
            op, shape, dtype, tensor = raw["op"], tuple(raw["shape"]), raw["dtype"], raw["tensor"]
            if op == "take" and _is_shape(shape) and type(dtype) is type(tensor) is str and dtype in NUMPY:
                return Recipe(op, shape, dtype, tensor=tensor)
        return _checked(
            Recipe(
                op=raw["op"],
                shape=tuple(raw["shape"]),
                dtype=raw["dtype"],
                parts=tuple(read_recipe(part) for part in raw.get("parts", ())),
                tensor=raw.get("tensor"),
                axis=raw.get("axis"),
                start=raw.get("start"),
                stop=raw.get("stop"),
                perm=tuple(raw["perm"]) if "perm" in raw else None,
                params=dict(raw.get("params", {})),
            )
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ProgramError(f"bindings.json: malformed recipe ({error}); export the program again") from None


def _checked(recipe: Recipe) -> Recipe:
    """Return a recipe whose fields are those of its op and whose shape and dtype are those of its parts.

    Raises:
        ValueError, TypeError: they are not.
    """
    op, shape, parts = recipe.op, recipe.shape, recipe.parts
    if op not in _FIELDS:
        raise ValueError(f"unknown recipe op {op!r}")
    if not _is_shape(shape):
        raise ValueError(f"{op} of the shape {shape!r:.100}")
    if not isinstance(recipe.dtype, str) or recipe.dtype not in NUMPY:
        raise ValueError(f"{op} of dtype {recipe.dtype!r}")
    values = (recipe.tensor, recipe.axis, recipe.start, recipe.stop, recipe.perm, recipe.params or None)
    used = [name for name, value in zip(_OPTIONAL, values) if value is not None]
    if used != _FIELDS[op]:
        raise ValueError(f"{op} has {', '.join(used) or 'no fields'}, expected {_FIELDS[op]}")
    if recipe.params and not all(
        type(value) in (int, float) and abs(value) < _MOST for value in recipe.params.values()
    ):
        raise ValueError(f"{op} has params that are no numbers")
    if len(parts) != _NUM_PARTS.get(op, 1) and (op not in ("concat", "stack") or not parts):
        raise ValueError(f"{op} has {len(parts)} parts")
    shape_and_dtype = _shape_of(recipe)
    if shape_and_dtype != (shape, recipe.dtype):
        raise ValueError(
            f"{op} says {list(shape)} {recipe.dtype}, its parts make {list(shape_and_dtype[0])} {shape_and_dtype[1]}"
        )
    return recipe


def _is_shape(shape: tuple[Any, ...]) -> bool:
    for size in shape:
        if type(size) is not int or size < 0:
            return False
    return len(shape) <= 8 and math.prod(shape) < _MOST


def _shape_of(recipe: Recipe) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a recipe by its parts; of ops that may give any, its own."""
    op, parts, axis = recipe.op, recipe.parts, recipe.axis
    first = parts[0] if parts else recipe
    if op == "take":
        if not isinstance(recipe.tensor, str):
            raise ValueError("take of no tensor")
        return recipe.shape, recipe.dtype
    if op == "computed":
        return _table_shape(recipe)
    if axis is not None and not (type(axis) is int and 0 <= axis < len(recipe.shape)):
        raise ValueError(f"{op} along axis {axis!r} of {list(recipe.shape)}")
    if op == "slice":
        assert axis is not None
        if type(recipe.start) is not int or type(recipe.stop) is not int:
            raise ValueError("slice without whole numbers")
        made = slice_(first, axis, recipe.start, recipe.stop)
    elif op == "reshape":
        made = reshape(first, recipe.shape)
    elif op == "transpose":
        assert recipe.perm is not None
        if any(type(p) is not int for p in recipe.perm) or sorted(recipe.perm) != list(range(len(first.shape))):
            raise ValueError(f"transpose by {recipe.perm!r:.100}")
        made = transpose(first, recipe.perm)
    elif op in ("concat", "stack"):
        assert axis is not None
        without = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
        alike = without if op == "concat" else {part.shape for part in parts}
        ranks = {(len(part.shape), part.dtype) for part in parts}
        if len(alike) != 1 or len(ranks) != 1 or (op == "stack" and axis != 0):
            raise ValueError(f"{op} of parts that are not alike")
        made = concat(parts, axis) if op == "concat" else stack(parts)
    elif op == "split":
        whole = first.shape[axis or 0]
        if not recipe.shape[axis or 0] or whole % recipe.shape[axis or 0]:
            raise ValueError(f"split of {list(first.shape)} into {list(recipe.shape)}")
        made = replace(
            first, shape=(*first.shape[: axis or 0], recipe.shape[axis or 0], *first.shape[(axis or 0) + 1 :])
        )
    elif op == "dequantize":
        weight, scale = parts
        blocks = (*weight.shape[:-2], *(-(-size // FP8_BLOCK) for size in weight.shape[-2:]))
        if len(weight.shape) < 2 or (weight.dtype, scale.dtype, scale.shape) != ("f8e4m3", "f32", blocks):
            raise ValueError(f"dequantize of {weight.dtype} {list(weight.shape)} by {scale.dtype} {list(scale.shape)}")
        made = dequantize(weight, scale, recipe.dtype)
        if recipe.dtype not in _FLOATS:
            raise ValueError(f"dequantize to {recipe.dtype}")
    elif op in ("block_codes", "block_scales"):
        if first.dtype not in _FLOATS or len(first.shape) != 2:
            raise ValueError(f"{op} of {first.dtype} {list(first.shape)}")
        made = block_codes(first) if op == "block_codes" else block_scales(first)
    elif op == "scale_rows":
        scale = parts[1]
        fits = len(first.shape) == 2 and scale.shape in ((first.shape[0], 1), (1, 1))
        if (first.dtype, scale.dtype) != ("f8e4m3", "f32") or not fits or recipe.dtype not in _FLOATS:
            raise ValueError(f"scale_rows of {first.dtype} {list(first.shape)} by {scale.dtype} {list(scale.shape)}")
        made = scale_rows(first, scale, recipe.dtype)
    elif op in ("nvfp4_rows", "nvfp4_scales"):
        is_rows = op == "nvfp4_rows"
        fits = bool(first.shape) and (not is_rows or first.shape[-1] % NVFP4_BLOCK == 0)
        if first.dtype != ("f8e4m3" if is_rows else "f32") or not fits:
            raise ValueError(f"{op} of {first.dtype} {list(first.shape)}")
        made = nvfp4_rows(first) if is_rows else nvfp4_scales(first)
    elif op == "nvfp4":
        made = _nvfp4(recipe)
    elif op == "cast":
        if recipe.dtype not in _FLOATS or first.dtype not in (*_FLOATS, "f8e4m3"):
            raise ValueError(f"cast of {first.dtype} to {recipe.dtype}")
        made = replace(first, dtype=recipe.dtype)
    elif op == "bytes":
        if itemsize(first.dtype) != 1:
            raise ValueError(f"bytes of {first.dtype}")
        made = as_bytes(first)
    else:
        return _codes_shape(recipe, first)
    return made.shape, made.dtype


def _nvfp4(recipe: Recipe) -> Recipe:
    packed, blocks, whole = recipe.parts
    divides = recipe.params.get("divides")
    dtypes = (packed.dtype, blocks.dtype, whole.dtype)
    fits = len(packed.shape) == 2 and math.prod(whole.shape) == 1
    if dtypes != ("u8", "f8e4m3", "f32") or not fits or recipe.dtype not in _FLOATS or divides not in (0, 1):
        raise ValueError(f"nvfp4 of {', '.join(dtypes)} with the params {recipe.params!r:.60}")
    if 2 * packed.shape[1] % NVFP4_BLOCK or blocks.shape != (packed.shape[0], 2 * packed.shape[1] // NVFP4_BLOCK):
        raise ValueError(f"nvfp4 of {list(packed.shape)} bytes with the scales {list(blocks.shape)}")
    if recipe.params.keys() != {"divides"}:
        raise ValueError(f"nvfp4 with the params {sorted(recipe.params)!r:.100}")
    return dequantize_nvfp4(packed, blocks, whole, recipe.dtype, divides=bool(divides))


def _codes_shape(recipe: Recipe, first: Recipe) -> tuple[tuple[int, ...], str]:
    bits, block_size = recipe.params.get("bits"), recipe.params.get("block_size")
    expected = "i8" if recipe.op == "packed" else "f32"
    if bits not in (4, 8) or type(block_size) is not int or not 2 <= block_size <= 1 << 16 or first.dtype != expected:
        raise ValueError(f"{recipe.op} of {first.dtype} with {bits!r} bits in blocks of {block_size!r}")
    if not first.shape or first.shape[-1] % block_size or block_size % 2:
        raise ValueError(f"{recipe.op} of {list(first.shape)} in blocks of {block_size}")
    short = (*first.shape[:-1], first.shape[-1] // block_size)
    shapes = {
        "codes": (first.shape, "i8"),
        "code_scales": (short, "f32"),
        "packed": ((*short, block_size * int(bits) // 8), "u8"),
    }
    return shapes[recipe.op]


def _table_shape(recipe: Recipe) -> tuple[tuple[int, ...], str]:
    params = recipe.params
    wanted = _TABLE_PARAMS.get(recipe.tensor or "")
    if wanted is None or not set(wanted) <= params.keys() <= {*wanted, _RANK_PARAMS.get(recipe.tensor or "")}:
        raise ValueError(f"computed table {recipe.tensor!r} with the params {sorted(params)!r:.200}")
    sizes = [params[key] for key in wanted[:2] if key not in _ROPE_PARAMS]
    if not all(type(size) is int and 1 <= size <= 1 << 24 for size in sizes):
        raise ValueError(f"computed table {recipe.tensor} of the sizes {sizes!r:.100}")
    if recipe.tensor == "ones":
        if params["rows"] * params["columns"] > 1 << 24:
            raise ValueError(f"ones of {params['rows']} rows and {params['columns']} columns")
        return (int(params["rows"]), int(params["columns"])), "f32"
    if recipe.tensor == "hadamard":
        size = int(params["size"])
        if size > 1 << 12 or size & (size - 1):
            raise ValueError(f"hadamard of size {size}, expected a power of two up to 4096")
        return (size, size), "f32"
    if recipe.tensor in _RANK_PARAMS:
        size, groups, rank = *map(int, sizes), params.get(_RANK_PARAMS[recipe.tensor], 0)
        if size % groups or type(rank) is not int or not 0 <= rank < groups:
            raise ValueError(f"{recipe.tensor} of {size} over {groups} groups")
        return (size if recipe.tensor == "expert_map" else 1,), "i32"
    positive = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    if not all(params[key] > 0 for key in positive) or params["rope_theta"] == 1 or params["dim"] % 2:
        raise ValueError(f"{recipe.tensor} with params that no table has: {params!r:.200}")
    if params["dim"] > 1 << 16:
        raise ValueError(f"{recipe.tensor} of dim {params['dim']}")
    # of a stage's engine a table may be cut to the longest sequence
    rows = recipe.shape[0] if recipe.shape else 0
    if not 0 < rows <= params["num_positions"]:
        raise ValueError(f"{recipe.tensor} of {rows} positions, expected 1 to {params['num_positions']}")
    return (rows, int(params["dim"]) // 2), "f32"
