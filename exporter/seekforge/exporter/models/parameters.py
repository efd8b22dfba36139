"""What a table of parameters consists of, and what follows from one: tensors of a checkpoint, recipes of a program.

A family's `parameters` module (`deepseek_v32.parameters`, for instance) lists the tensors that a checkpoint holds and
the parameters that a program makes of them; `shared.parameters` has the rows of several families. Everything else that
is known about weights is derived from those rows: the schema of checkpoints and the MTP layer's copies
(`checkpoint.schema`), random values (`checkpoint.new`), recipes (here), bytes and FLOPs (`sizing`), and the words for a
module in messages (`builder.tensorrt.diagnostics`). No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.weight_recipes import (
    Recipe,
    cast,
    concat,
    dequantize,
    reshape,
    slice_,
    split,
    stack,
    take,
)
from seekforge.formats.weight_recipes.stored import block_recipes, kept_recipes, values_recipe

#: How a tensor is divided among tensor-parallel ranks: not at all, along its axis, as experts are: along the axis too,
#: or dealt out whole with expert parallelism, or as the vocabulary is: along the axis where that divides, else whole.
Sharding = Literal["none", "tensor", "experts", "vocabulary"]
#: How random values of a tensor are drawn: see `checkpoint.new`.
Draw = Literal["blocks", "branch", "paired_heads", "plain", "norm", "shift", "bias", "router", "embedding", "head"]
#: Stands for the number of an expert in a tensor's name.
EXPERT = "{expert}"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, or one of each routed expert.

    A matrix that programs have as FP8 blocks is stored in the form of its checkpoint (`ModelConfig.weight_form`), with
    tensors of scales beside it.

    Attributes:
        name: below `model.layers.N.`, or the whole name outside layers; `EXPERT` stands for the number of an expert.
        shape: sizes, outermost first.
        dtype: element type in the checkpoint; f8e4m3 stands for the form of the checkpoint.
        sharding: how ranks divide it (`sharding`, `recipes_of`).
        axis: the axis along which they do; None: each rank reads it whole.
        units: parts along that axis that stay whole: heads, or columns.
        units_key: what config.json calls their number.
        count: number of such tensors, which is the number of experts where the name has one.
        active: how many of them one token is multiplied with; 0 for what is no matrix product.
        held: element type in which engines hold it; None: as it is in the checkpoint.
        draw: how random values are drawn.
        copy_of: the main model's tensor that this one of the MTP layer repeats.
        is_head: whether only rows that get logits are multiplied with it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["f8e4m3", "bf16", "f32"] = "f8e4m3"
    sharding: Sharding = "none"
    axis: int | None = None
    units: int = 1
    units_key: str = ""
    count: int = 1
    active: int = 1
    held: Literal["bf16", "f32"] | None = None
    draw: Draw = "blocks"
    copy_of: str | None = None
    is_head: bool = False

    @property
    def module(self) -> str:
        """The name without the `.weight` at its end."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a program, or a weight with its scales.

    Attributes:
        name: below `layers.N.`, or the whole name outside layers. `linear` and `experts` add their own endings.
        form: what is made of the tensors. `linear`: FP8 matrices stacked by rows, with their scales. `value`: one
            tensor as it is, bf16 in the dtype of activations. `per_head`: some rows of each head of an FP8 matrix,
            dequantized. `experts`: FP8 matrices of all routed experts stacked, each of them of one or more by rows.
        tensors: modules or names of `Tensor`s, in the order in which their rows are stacked.
        does: what it is, for people.
        op: the operator that multiplies with it, or norms with it, as it is in a GPU engine; empty where there is none.
        rows: which rows of each head of `kv_b_proj` a `per_head` parameter takes.
        is_behind: whether only results behind the last layer read it.
        beside: the linear that multiplies the same value, with which an engine for GPUs has it as one (`joins`).
        norm: the norm whose result an FP8 linear or the experts multiply, which an engine for GPUs quantizes with it.
        adds: whether it norms the sum of the two streams.
        shared: whether it is a linear of the shared expert, which an engine for GPUs can have as one more of the routed
            ones (`moe_experts.operator.shared_size`).
    """

    name: str
    form: Literal["linear", "value", "per_head", "experts"]
    tensors: tuple[str, ...]
    does: str
    op: str = ""
    rows: Literal["keys", "values"] = "keys"
    is_behind: bool = False
    beside: str = ""
    norm: str = ""
    adds: bool = False
    shared: bool = False

    @property
    def module(self) -> str:
        """The module whose parameter it is."""
        return self.name if self.form == "linear" else self.name.rpartition(".")[0] or self.name


def num_shares(sharding: Sharding, size: int, tp: int) -> int:
    """Return into how many equal parts so many tensor-parallel ranks divide a tensor, or all tensors of its row.

    Args:
        sharding: how.
        size: along the axis.
        tp: ranks.
    """
    if sharding == "none" or (sharding == "vocabulary" and size % tp):
        return 1
    return tp


def expert_names(tensor: Tensor, prefix: str = "") -> list[str]:
    """Return the names of all tensors that a row stands for."""
    if EXPERT not in tensor.name:
        return [prefix + tensor.name]
    return [prefix + tensor.name.replace(EXPERT, str(expert)) for expert in range(tensor.count)]


def in_order(tensors: Sequence[Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the full name of every tensor in a checkpoint's order: all those of an expert, then the next expert's."""
    routed = [tensor for tensor in tensors if EXPERT in tensor.name]
    last = routed[-1] if routed else None
    for tensor in tensors:
        if EXPERT not in tensor.name:
            yield prefix + tensor.name, tensor
        elif tensor is last:
            for names in zip(*(expert_names(one, prefix) for one in routed), strict=True):
                yield from zip(names, routed, strict=True)


def recipes_of(
    parameters: Iterable[Parameter],
    tensors: Iterable[Tensor],
    config: ModelConfig,
    *,
    source: str,
    target: str,
    dtype: str,
    parallelism: Parallelism,
    keeps: bool = False,
) -> dict[str, Recipe]:
    """Return the recipes of some parameters.

    Args:
        parameters: rows of the program.
        tensors: rows of the checkpoint that they name, and others.
        config: the model.
        source: prefix of the tensors' names.
        target: prefix of the parameters' names.
        dtype: element type of activations.
        parallelism: how ranks share the model.
        keeps: whether matrices keep the checkpoint's values, in `dtype`, and are no FP8 blocks.
    """

    def pair(tensor: Tensor, name: str) -> tuple[Recipe, Recipe]:
        form = config.weight_form(name)
        made = kept_recipes(form, name, tensor.shape, dtype) if keeps else block_recipes(form, name, tensor.shape)
        return _divided(tensor, made, parallelism)

    named = {key: tensor for tensor in tensors for key in (tensor.name, tensor.module)}
    result: dict[str, Recipe] = {}
    for row in parameters:
        rows, name = [named[part] for part in row.tensors], target + row.name
        if row.form == "linear":
            weights, scales = zip(*(pair(tensor, source + tensor.name) for tensor in rows), strict=True)
            _check_blocks(rows)
            result[f"{name}.weight"] = _stacked(weights)
            result[f"{name}.weight_scale"] = _stacked(scales)
        elif row.form == "experts":
            columns = [[pair(tensor, one) for one in expert_names(tensor, source)] for tensor in rows]
            result[name], result[f"{name}_scale"] = _experts(columns, parallelism)
        elif row.form == "per_head":
            result[name] = _per_head(row, rows[0], config, source, dtype, parallelism, keeps)
        else:
            whole = take(source + rows[0].name, rows[0].shape, rows[0].dtype)
            if rows[0].axis is not None:
                whole = split(whole, rows[0].axis, _shares(rows[0], parallelism))
            result[name] = cast(whole, dtype) if rows[0].dtype == "bf16" else whole
    return result


def _divided(tensor: Tensor, pair: tuple[Recipe, Recipe], parallelism: Parallelism) -> tuple[Recipe, Recipe]:
    """Return the recipes of a matrix and of its block scales, or of each rank's part of them."""
    weight, scale = pair
    if tensor.axis is None or (tensor.sharding == "experts" and parallelism.ep):
        return weight, scale
    return split(weight, tensor.axis, parallelism.tp), split(scale, tensor.axis, parallelism.tp)


def _shares(tensor: Tensor, parallelism: Parallelism) -> int:
    assert tensor.axis is not None
    return num_shares(tensor.sharding, tensor.shape[tensor.axis], parallelism.tp)


def _check_blocks(rows: Sequence[Tensor]) -> None:
    """Every matrix but the last has a multiple of 128 rows, so that each starts on a block."""
    assert all(tensor.shape[0] % FP8_BLOCK == 0 for tensor in rows[:-1]), rows


def _stacked(parts: Sequence[Recipe]) -> Recipe:
    return parts[0] if len(parts) == 1 else concat(parts)


def _experts(columns: Sequence[Sequence[tuple[Recipe, Recipe]]], parallelism: Parallelism) -> tuple[Recipe, Recipe]:
    """Return the recipes of stacked matrices and scales; with expert parallelism each rank has some of them.

    Args:
        columns: for each matrix of an expert, the pair of every expert.
        parallelism: how ranks share the model.
    """
    pairs = list(zip(*columns, strict=True))
    weights, scales = (stack(_stacked([part[which] for part in parts]) for parts in pairs) for which in (0, 1))
    return split(weights, 0, parallelism.ep_size), split(scales, 0, parallelism.ep_size)


def _per_head(
    row: Parameter,
    tensor: Tensor,
    config: ModelConfig,
    source: str,
    dtype: str,
    parallelism: Parallelism,
    keeps: bool,
) -> Recipe:
    nope, size, name = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim, source + tensor.name
    form = config.weight_form(name)
    if keeps:
        values = values_recipe(form, name, tensor.shape, dtype)
    else:
        values = dequantize(*block_recipes(form, name, tensor.shape), dtype)
    per_head = reshape(values, (config.num_attention_heads, size, tensor.shape[1]))
    start, stop = (0, nope) if row.rows == "keys" else (nope, size)
    return split(slice_(per_head, 1, start, stop), 0, parallelism.tp)


def joins(parameters: Iterable[Parameter]) -> Iterator[tuple[Parameter, Parameter]]:
    """Yield the linears of a table that engines for GPUs have as one, in the order in which their rows are stacked.

    Blocks of the second must begin a block of the joined weight: the first has a multiple of 128 rows on each rank, or
    both stay apart.
    """
    named = {one.name: one for one in parameters}
    yield from ((named[one.beside], one) for one in named.values() if one.beside)


def joined_name(first: Parameter, second: Parameter) -> str:
    """Return the module of the weight that two linears become."""
    return f"{first.module}_{second.module.rpartition('.')[2]}"


def joined_shapes_of(
    parameters: Sequence[Parameter], tensors: Sequence[Tensor], op: str, parallelism: Parallelism
) -> dict[tuple[str, ...], tuple[int, int]]:
    """Return (out features, in features) of the products of an operator on one rank as an engine for GPUs has them.

    Returns:
        Modules that a weight is of, one or two -> sizes, in the order of the table.
    """
    shapes = {one.module: shape for one in parameters for shape in linear_shapes_of([one], tensors, op, parallelism)}
    result = {(name,): shape for name, shape in shapes.items()}
    for first, second in joins(parameters):
        if first.module in shapes and second.module in shapes and shapes[first.module][0] % FP8_BLOCK == 0:
            n, k = shapes[first.module]
            pair = (first.module, second.module), (n + shapes[second.module][0], k)
            result = dict(pair if key == (first.module,) else (key, shape) for key, shape in result.items())
            del result[(second.module,)]
    return result


def linear_shapes_of(
    parameters: Iterable[Parameter], tensors: Iterable[Tensor], op: str, parallelism: Parallelism
) -> Iterator[tuple[int, int]]:
    """Yield (out features, in features) of the matrices that an operator multiplies with on one rank."""
    named = {key: tensor for tensor in tensors for key in (tensor.name, tensor.module)}
    for parameter in parameters:
        if parameter.op == op:
            rows = [named[name] for name in parameter.tensors]
            n, k = sum(tensor.shape[0] for tensor in rows), rows[0].shape[1]
            shares = 1 if rows[0].axis is None else _shares(rows[0], parallelism)
            yield (n // shares if rows[0].axis == 0 else n), (k // shares if rows[0].axis == 1 else k)
