"""How each weight input of a program comes from checkpoint tensors: recipes, their evaluation, coverage.

A recipe is a small tree. Leaves name a checkpoint tensor (`take`) or a table computed from the config
(`computed`); inner nodes slice, reshape, concatenate, stack, dequantize, cast, or split among ranks. It is plain
data (bindings.json), so that any runtime can fill the inputs straight from the shards. One file serves all ranks:
`for_rank` turns each split into the slice of one rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from seekforge.common.dtypes import NUMPY, itemsize, widen
from seekforge.common.errors import ProgramError
from seekforge.formats.int_codes import evaluate_codes
from seekforge.formats.parallelism import Parallelism

_BLOCK = 128
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


class TensorSource(Protocol):
    """Where checkpoint tensors come from. `formats.safetensors.Checkpoint` is one."""

    def tensor(self, name: str) -> np.ndarray:
        """Return the tensor without copying where possible (float8 and bfloat16 as ml_dtypes)."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One node of a recipe tree.

    Attributes:
        op: take, slice, reshape, transpose, concat, stack, dequantize, cast, bytes, split or computed; codes,
            code_scales or packed (`formats.quantized`).
        shape: shape of the result.
        dtype: element type of the result (our names, `dtypes.NUMPY`).
        parts: operands. `dequantize` has two: FP8 weight and f32 scale.
        tensor: `take`: the name of the checkpoint tensor. `computed`: rope_cos, rope_sin, hadamard or
            expert_map.
        axis, start, stop: the bounds of slice; axis also that of concat, stack and split, of which each rank has an
            equal part.
        perm: the order of axes of transpose.
        params: for computed, the numbers that the table depends on; for codes, bits and block_size.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Recipe, ...] = ()
    tensor: str | None = None
    axis: int | None = None
    start: int | None = None
    stop: int | None = None
    perm: tuple[int, ...] | None = None
    params: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; fields that are not set are left out."""
        raw: dict[str, Any] = {"op": self.op, "shape": list(self.shape), "dtype": self.dtype}
        for key in ("tensor", "axis", "start", "stop"):
            if getattr(self, key) is not None:
                raw[key] = getattr(self, key)
        if self.perm is not None:
            raw["perm"] = list(self.perm)
        if self.params:
            raw["params"] = dict(self.params)
        if self.parts:
            raw["parts"] = [part.to_dict() for part in self.parts]
        return raw

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from bindings.json.

        Raises:
            ProgramError: a field is missing or malformed.
        """
        try:
            return _checked(
                Recipe(
                    op=raw["op"],
                    shape=tuple(raw["shape"]),
                    dtype=raw["dtype"],
                    parts=tuple(Recipe.from_dict(part) for part in raw.get("parts", ())),
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


#: Numbers that a computed table depends on, and of which of them its shape follows.
_TABLE_PARAMS = {
    "rope_cos": ("num_positions", "dim", *_ROPE_PARAMS),
    "rope_sin": ("num_positions", "dim", *_ROPE_PARAMS),
    "hadamard": ("size",),
    "expert_map": ("num_experts", "ep"),
}
_FIELDS = {"take": {"tensor"}, "computed": {"tensor", "params"}, "slice": {"axis", "start", "stop"}, "concat": {"axis"}}
_FIELDS |= {"stack": {"axis"}, "split": {"axis"}, "transpose": {"perm"}}
_FIELDS |= {op: set() for op in ("reshape", "dequantize", "cast", "bytes")}
_FIELDS |= {op: {"params"} for op in ("codes", "code_scales", "packed")}


def _checked(recipe: Recipe) -> Recipe:
    """Return a recipe whose fields are those of its op and whose shape and dtype are those of its parts.

    Raises:
        ValueError, TypeError: they are not.
    """
    op, shape, parts = recipe.op, recipe.shape, recipe.parts
    if op not in _FIELDS:
        raise ValueError(f"unknown recipe op {op!r}")
    if len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) >= _MOST:
        raise ValueError(f"{op} of the shape {shape!r:.100}")
    if not isinstance(recipe.dtype, str) or recipe.dtype not in NUMPY:
        raise ValueError(f"{op} of dtype {recipe.dtype!r}")
    used = {name for name in ("tensor", "axis", "start", "stop", "perm") if getattr(recipe, name) is not None}
    used |= {"params"} if recipe.params else set()
    if used != _FIELDS[op]:
        raise ValueError(f"{op} has {', '.join(sorted(used)) or 'no fields'}, expected {sorted(_FIELDS[op])}")
    if not all(type(value) in (int, float) and abs(value) < _MOST for value in recipe.params.values()):
        raise ValueError(f"{op} has params that are no numbers")
    counts = {"take": 0, "computed": 0, "dequantize": 2}
    if len(parts) != counts.get(op, 1) and (op not in ("concat", "stack") or not parts):
        raise ValueError(f"{op} has {len(parts)} parts")
    shape_and_dtype = _shape_of(recipe)
    if shape_and_dtype != (shape, recipe.dtype):
        raise ValueError(
            f"{op} says {list(shape)} {recipe.dtype}, its parts make {list(shape_and_dtype[0])} {shape_and_dtype[1]}"
        )
    return recipe


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
        blocks = (*weight.shape[:-2], *(-(-size // _BLOCK) for size in weight.shape[-2:]))
        if len(weight.shape) < 2 or (weight.dtype, scale.dtype, scale.shape) != ("f8e4m3", "f32", blocks):
            raise ValueError(f"dequantize of {weight.dtype} {list(weight.shape)} by {scale.dtype} {list(scale.shape)}")
        made = dequantize(weight, scale, recipe.dtype)
        if recipe.dtype not in _FLOATS:
            raise ValueError(f"dequantize to {recipe.dtype}")
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
    if wanted is None or not set(wanted) <= params.keys() <= {*wanted, "ep_rank"}:
        raise ValueError(f"computed table {recipe.tensor!r} with the params {sorted(params)!r:.200}")
    sizes = [params[key] for key in wanted[:2] if key not in _ROPE_PARAMS]
    if not all(type(size) is int and 1 <= size <= 1 << 24 for size in sizes):
        raise ValueError(f"computed table {recipe.tensor} of the sizes {sizes!r:.100}")
    if recipe.tensor == "hadamard":
        size = int(params["size"])
        if size > 1 << 12 or size & (size - 1):
            raise ValueError(f"hadamard of size {size}, expected a power of two up to 4096")
        return (size, size), "f32"
    if recipe.tensor == "expert_map":
        ranks = params.get("ep_rank", 0)
        if int(params["num_experts"]) % int(params["ep"]) or type(ranks) is not int or not 0 <= ranks < params["ep"]:
            raise ValueError(f"expert_map of {params['num_experts']} experts over {params['ep']} groups")
        return (int(params["num_experts"]),), "i32"
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


# --- constructors, which compute the shape ------------------------------------------------------------------


def take(tensor: str, shape: Iterable[int], dtype: str) -> Recipe:
    """The checkpoint tensor `tensor` as it is; one stored in a narrower type is widened (`dtypes.WIDENED_FROM`)."""
    return Recipe("take", tuple(shape), dtype, tensor=tensor)


def slice_(part: Recipe, axis: int, start: int, stop: int) -> Recipe:
    """Rows `start` to `stop` of `part` along `axis`."""
    if not 0 <= start < stop <= part.shape[axis]:
        raise ProgramError(f"slice {start}:{stop} of axis {axis} of {part.shape} is empty or out of range")
    shape = (*part.shape[:axis], stop - start, *part.shape[axis + 1 :])
    return Recipe("slice", shape, part.dtype, (part,), axis=axis, start=start, stop=stop)


def reshape(part: Recipe, shape: Iterable[int]) -> Recipe:
    """`part` seen with another shape of the same size."""
    shape = tuple(shape)
    if math.prod(shape) != math.prod(part.shape):
        raise ProgramError(f"reshape of {part.shape} to {shape} changes the number of elements")
    return Recipe("reshape", shape, part.dtype, (part,))


def transpose(part: Recipe, perm: Iterable[int]) -> Recipe:
    """`part` with its axes permuted."""
    perm = tuple(perm)
    return Recipe("transpose", tuple(part.shape[p] for p in perm), part.dtype, (part,), perm=perm)


def concat(parts: Iterable[Recipe], axis: int = 0) -> Recipe:
    """`parts` one after the other along `axis`."""
    parts = tuple(parts)
    first = parts[0]
    shape = (*first.shape[:axis], sum(p.shape[axis] for p in parts), *first.shape[axis + 1 :])
    return Recipe("concat", shape, first.dtype, parts, axis=axis)


def stack(parts: Iterable[Recipe]) -> Recipe:
    """`parts` along a new first axis."""
    parts = tuple(parts)
    return Recipe("stack", (len(parts), *parts[0].shape), parts[0].dtype, parts, axis=0)


def dequantize(weight: Recipe, scale: Recipe, dtype: str) -> Recipe:
    """`weight` [..., N, K] times its 128×128 block scales [..., ⌈N/128⌉, ⌈K/128⌉], rounded to `dtype`."""
    return Recipe("dequantize", weight.shape, dtype, (weight, scale))


def cast(part: Recipe, dtype: str) -> Recipe:
    """`part` rounded to `dtype`; `part` itself when it already has it."""
    if part.dtype == dtype:
        return part
    return Recipe("cast", part.shape, dtype, (part,))


def as_bytes(part: Recipe) -> Recipe:
    """FP8 values as int8 elements of the same bytes, for targets without a float8 type."""
    return Recipe("bytes", part.shape, "i8", (part,))


def retarget(recipe: Recipe, *, activations: str, fp8_dtype: str) -> Recipe:
    """Return `recipe` for a specialized program: bf16 results become `activations`, FP8 ones `fp8_dtype`.

    A dequantized weight is rounded to `activations` directly, so f32 keeps every bit.
    """
    if recipe.op == "take":
        if recipe.dtype == "f8e4m3":
            return recipe if fp8_dtype == "f8e4m3" else as_bytes(recipe)
        return cast(recipe, activations) if recipe.dtype == "bf16" else recipe
    if recipe.op == "dequantize":
        return replace(recipe, dtype=activations if recipe.dtype == "bf16" else recipe.dtype)
    parts = tuple(retarget(part, activations=activations, fp8_dtype=fp8_dtype) for part in recipe.parts)
    if recipe.op == "cast":
        return cast(parts[0], activations) if recipe.dtype == "bf16" else replace(recipe, parts=parts)
    return replace(recipe, parts=parts, dtype=parts[0].dtype if parts else recipe.dtype)


def split(part: Recipe, axis: int, num_ranks: int) -> Recipe:
    """An equal part of `part` along `axis` for each of `num_ranks` ranks; `part` itself for one.

    Raises:
        ProgramError: the axis does not divide.
    """
    if num_ranks == 1:
        return part
    if part.shape[axis] % num_ranks:
        raise ProgramError(f"axis {axis} of {part.shape} does not divide into {num_ranks} equal parts")
    shape = (*part.shape[:axis], part.shape[axis] // num_ranks, *part.shape[axis + 1 :])
    return Recipe("split", shape, part.dtype, (part,), axis=axis)


def for_rank(recipe: Recipe, parallelism: Parallelism, tp_rank: int) -> Recipe:
    """Return what one rank of a stage reads: every split becomes that rank's slice.

    Raises:
        ProgramError: there is no such rank, or a split is one among another number of ranks.
    """
    tp = parallelism.tp
    if not 0 <= tp_rank < tp:
        raise ProgramError(f"tensor-parallel rank {tp_rank}: expected 0 to {tp - 1} of {parallelism}")
    if tp == 1:
        return recipe
    if recipe.tensor == "expert_map":
        return replace(recipe, params=recipe.params | {"ep_rank": tp_rank if parallelism.ep else 0})
    if not recipe.parts:
        return recipe
    if recipe.op == "split":
        assert recipe.axis is not None
        whole, size = recipe.parts[0], recipe.shape[recipe.axis]
        if whole.shape[recipe.axis] != size * tp:
            raise ProgramError(
                f"bindings: a split of {list(whole.shape)} into {list(recipe.shape)} is not one among {tp} ranks"
            )
        start, stop = tp_rank * size, (tp_rank + 1) * size
        if whole.op == "stack" and recipe.axis == 0:  # name only the parts that are read
            return stack(for_rank(part, parallelism, tp_rank) for part in whole.parts[start:stop])
        return slice_(for_rank(whole, parallelism, tp_rank), recipe.axis, start, stop)
    return replace(recipe, parts=tuple(for_rank(part, parallelism, tp_rank) for part in recipe.parts))


def expert_map(num_experts: int, parallelism: Parallelism) -> Recipe:
    """The table [num_experts] i32 from an expert's number to its place on this rank, −1 where it is elsewhere."""
    params: dict[str, float] = {"num_experts": num_experts, "ep": parallelism.ep_size}
    return Recipe("computed", (num_experts,), "i32", tensor="expert_map", params=params)


def rope_table(kind: str, *, num_positions: int, dim: int, rope: Mapping[str, float]) -> Recipe:
    """The cosine or sine table [num_positions, dim / 2] in f32 (`kind`: rope_cos or rope_sin)."""
    params = {"num_positions": num_positions, "dim": dim, **rope}
    return Recipe("computed", (num_positions, dim // 2), "f32", tensor=kind, params=params)


def hadamard_table(size: int) -> Recipe:
    """The orthonormal Sylvester Hadamard matrix [size, size] in f32 (spec §3.6)."""
    return Recipe("computed", (size, size), "f32", tensor="hadamard", params={"size": size})


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluate(recipe: Recipe, source: TensorSource) -> np.ndarray:
    """Compute a recipe.

    A `take`, `slice` or `reshape` is a view of the source (no copy); `concat`, `stack`, `dequantize` and
    `cast` allocate their result once.

    Returns:
        Array of `recipe.shape` and `recipe.dtype`.
    """
    if recipe.op == "take":
        assert recipe.tensor is not None
        return widen(source.tensor(recipe.tensor), recipe.dtype)
    if recipe.op == "computed":
        return _computed(recipe)
    if recipe.op in ("concat", "stack"):
        out = np.empty(recipe.shape, NUMPY[recipe.dtype])
        evaluate_into(recipe, source, out)
        return out
    first = evaluate(recipe.parts[0], source)
    if recipe.op == "slice":
        assert recipe.axis is not None
        index = [slice(None)] * first.ndim
        index[recipe.axis] = slice(recipe.start, recipe.stop)
        return first[tuple(index)]
    if recipe.op == "reshape":
        return first.reshape(recipe.shape)
    if recipe.op == "transpose":
        return first.transpose(recipe.perm)
    if recipe.op == "bytes":
        return np.ascontiguousarray(first).view(np.int8)
    if recipe.op == "cast":
        return first.astype(NUMPY[recipe.dtype])
    if recipe.op == "dequantize":
        out = np.empty(recipe.shape, NUMPY[recipe.dtype])
        dequantize_into(first, evaluate(recipe.parts[1], source), out)
        return out
    if recipe.op in ("codes", "code_scales", "packed"):
        return evaluate_codes(recipe.op, recipe.params, first)
    if recipe.op == "split":
        raise ProgramError("bindings: this recipe is shared by several ranks; apply for_rank first")
    raise ProgramError(f"bindings.json: unknown recipe op {recipe.op!r}; it was written by a newer version")


def evaluate_into(recipe: Recipe, source: TensorSource, out: np.ndarray) -> None:
    """Compute a recipe into `out`, which has its shape and dtype; parts are written in place."""
    if recipe.op == "stack":
        for part, row in zip(recipe.parts, out, strict=True):
            evaluate_into(part, source, row)
    elif recipe.op == "concat":
        assert recipe.axis is not None
        start = 0
        for part in recipe.parts:
            stop = start + part.shape[recipe.axis]
            index = [slice(None)] * out.ndim
            index[recipe.axis] = slice(start, stop)
            evaluate_into(part, source, out[tuple(index)])
            start = stop
    elif recipe.op == "transpose":
        assert recipe.perm is not None
        evaluate_into(recipe.parts[0], source, out.transpose(np.argsort(recipe.perm)))
    elif recipe.op == "dequantize":
        dequantize_into(evaluate(recipe.parts[0], source), evaluate(recipe.parts[1], source), out)
    elif recipe.op == "cast" and rounds_once(recipe):
        out[...] = evaluate(recipe.parts[0], source)
    else:
        out[...] = evaluate(recipe, source)


def rounds_once(recipe: Recipe) -> bool:
    """Whether assigning the operand of a cast gives the same as the cast: the operand itself rounds nothing."""
    part = recipe.parts[0]
    while part.op in ("slice", "reshape", "transpose"):
        part = part.parts[0]
    return part.op == "take"


def dequantize_into(weight: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Write `weight` [..., N, K] times its 128×128 block scales into `out`, one block row at a time.

    The product is formed in f32 and rounded once to the dtype of `out`. Extra memory: 128 rows.
    """
    if weight.ndim > 2:
        for w, s, o in zip(weight, scale, out, strict=True):
            dequantize_into(w, s, o)
        return
    k = weight.shape[1]
    for row, block_scale in enumerate(scale):
        rows = slice(row * _BLOCK, (row + 1) * _BLOCK)
        along_k = np.repeat(np.asarray(block_scale, np.float32), _BLOCK)[:k]
        out[rows] = FP8_VALUES[weight[rows].view(np.uint8)] * along_k


def _e4m3_values() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(NUMPY["f8e4m3"]).astype(np.float32)


#: The value of each e4m3 byte, f32; 0x7F and 0xFF are NaN.
FP8_VALUES = _e4m3_values()


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


def _computed(recipe: Recipe) -> np.ndarray:
    params = recipe.params
    if recipe.tensor == "hadamard":
        return hadamard(int(params["size"]))
    if recipe.tensor == "expert_map":
        if "ep_rank" not in params:
            raise ProgramError("bindings: expert_map is of no rank yet; apply for_rank first")
        per_rank = int(params["num_experts"]) // int(params["ep"])
        local = np.arange(int(params["num_experts"]), dtype=np.int32) - np.int32(params["ep_rank"] * per_rank)
        return np.where((local >= 0) & (local < per_rank), local, np.int32(-1))
    if recipe.tensor not in ("rope_cos", "rope_sin"):
        raise ProgramError(f"bindings.json: unknown computed table {recipe.tensor!r}")
    return rope_rows(recipe, 0, recipe.shape[0])


def rope_rows(recipe: Recipe, start: int, stop: int) -> np.ndarray:
    """Return the rows of positions [start, stop) of a cosine or sine table."""
    params = recipe.params
    positions = np.arange(start, stop, dtype=np.float32)
    angles = np.outer(positions, yarn_inv_freq(params)).astype(np.float32)
    table = np.cos(angles) if recipe.tensor == "rope_cos" else np.sin(angles)
    return table * np.float32(params["magnitude"])


# --- coverage -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Box:
    """A part of a checkpoint tensor: a rectangle in some view of it."""

    view: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def size(self) -> int:
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    def overlaps(self, other: _Box) -> bool:
        pairs = zip(self.start, self.stop, other.start, other.stop, strict=True)
        return all(a < d and c < b for a, b, c, d in pairs)


def _leaves(recipe: Recipe) -> Iterator[tuple[str, _Box]]:
    """Yield (tensor, part of it that is read) for every `take` below `recipe`."""
    if recipe.op == "take":
        assert recipe.tensor is not None
        yield recipe.tensor, _Box(recipe.shape, (0,) * len(recipe.shape), recipe.shape)
    elif recipe.op == "slice":
        assert recipe.axis is not None and recipe.start is not None
        assert recipe.stop is not None
        part = recipe.parts[0]
        for tensor, box in _leaves(part):
            if box.view == part.shape:
                start, stop = list(box.start), list(box.stop)
                start[recipe.axis] = max(start[recipe.axis], recipe.start)
                stop[recipe.axis] = min(stop[recipe.axis], recipe.stop)
                yield tensor, _Box(box.view, tuple(start), tuple(stop))
            else:  # such as a scale under a sliced dequantize: read whole, shared by the slices
                yield tensor, box
    elif recipe.op == "reshape":
        for tensor, box in _leaves(recipe.parts[0]):
            whole = box.size() == math.prod(box.view)
            if whole and math.prod(box.view) == math.prod(recipe.shape):
                yield tensor, _Box(recipe.shape, (0,) * len(recipe.shape), recipe.shape)
            else:
                yield tensor, box
    else:
        for part in recipe.parts:
            yield from _leaves(part)


def tensors_of(recipe: Recipe) -> set[str]:
    """Return the names of the checkpoint tensors that `recipe` reads."""
    return {tensor for tensor, _ in _leaves(recipe)}


@dataclass(frozen=True)
class Coverage:
    """What the recipes of a program read of a checkpoint.

    Attributes:
        used: elements read, by tensor; a part read twice counts once.
        shared: tensors of which a part is read by more than one input, and by which inputs.
    """

    used: dict[str, int]
    shared: dict[str, list[str]]


def coverage(recipes: Mapping[str, Recipe]) -> Coverage:
    """Account for every checkpoint element that `recipes` (input name -> recipe) read.

    A split counts with all its ranks: together they read the whole of it, each element once.
    """
    boxes: dict[str, dict[_Box, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, recipe in recipes.items():
        for tensor, box in _leaves(recipe):
            boxes[tensor][box].append(name)
    used: dict[str, int] = {}
    shared: dict[str, list[str]] = {}
    for tensor, parts in boxes.items():
        distinct = list(parts)
        users = sorted({name for names in parts.values() for name in names})
        clash = any(a.view != b.view or a.overlaps(b) for i, a in enumerate(distinct) for b in distinct[i + 1 :])
        if clash:
            full = math.prod(distinct[0].view)
            if max(box.size() for box in distinct) < full:
                raise ProgramError(
                    f"bindings: {tensor} is read in overlapping parts by {', '.join(users)}; "
                    "parts must be equal or apart"
                )
            used[tensor] = full
        else:
            used[tensor] = sum(box.size() for box in distinct)
        if clash or any(len(set(names)) > 1 for names in parts.values()):
            shared[tensor] = users
    return Coverage(used, shared)
