"""The operators that a step calls, one layer after another, with their sizes. No torch, no file.

What TensorRT runs itself (norms, RoPE, W_UK and W_UV, the embedding, sums over ranks) is no call here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import Parameter, Tensor, joined_shapes_of
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.paged_cache import BLOCK_SIZE, SCRAP_BLOCK, blocks_needed
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.plugins.kernels.sizes import operators, rank_model, static_sizes
from seekforge.plugins.moe_experts.spec import SPEC as MOE_EXPERTS
from seekforge.plugins.operator import RankModel, Step
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, BLOCK_FP8_LINEAR, KERNEL_FORMS

#: Operators of each part of a layer, in the order in which it calls them; linears stand in the family's table.
_LATENT_WRITE: Final = "MlaCacheWrite"
_WITH_INDEXER, _WITHOUT_INDEXER = ("DsaCacheWrite", "DsaIndexer", "DsaAttention"), (_LATENT_WRITE, "DsaAttention")
_DENSE = (_LATENT_WRITE, "MlaAttention")
_MOE = ("MoeRoute", MOE_EXPERTS.name)
#: Attributes that say how numbers come out, not how many there are.
_ANY_SCALE = {"scale": 1.0}


@dataclass(frozen=True)
class StepShape:
    """A step of one rank.

    Attributes:
        batch: sequences.
        queries: new tokens of each.
        context: keys that the last new token of each sequence sees.
    """

    batch: int
    queries: int
    context: int


@dataclass(frozen=True)
class Call:
    """One kind of call in a step.

    Attributes:
        op: ONNX op_type.
        what: the parameter that a linear multiplies with, below its layer, or two of them; empty for other operators.
        bound: sizes and attributes, under the symbols of the spec.
        count: how often the step calls it.
    """

    op: str
    what: str
    bound: Mapping[str, Any]
    count: int


def step_calls(
    config: ModelConfig,
    shape: StepShape,
    *,
    kv_format: str,
    parallelism: Parallelism = ONE_RANK,
    nvfp4_experts: bool = False,
) -> list[Call]:
    """Return the calls of a step of the main model, each kind once, in the order in which they first come.

    Args:
        config: the model.
        shape: the step.
        kv_format: format of the caches.
        parallelism: how ranks share the model; sizes are those of one of them.
        nvfp4_experts: whether it has experts in NVFP4.
    """
    forms: dict[str, Any] = {"kv_format": kv_format, "parallelism": parallelism}
    counts: dict[tuple[str, str, tuple[tuple[str, Any], ...]], int] = {}
    kinds: dict[LayerKind, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        kinds.setdefault(config.layer_kind(layer), []).append(layer)
    for layers in kinds.values():
        for op, what, bound in layer_calls(config, layers[0], shape, nvfp4_experts=nvfp4_experts, **forms):
            _count(counts, op, what, bound, len(layers))
    for op, what, bound in end_calls(config, shape, **forms):
        _count(counts, op, what, bound, 1)
    return [Call(op, what, dict(bound), count) for (op, what, bound), count in counts.items()]


def layer_calls(
    config: ModelConfig,
    layer: int,
    shape: StepShape,
    *,
    kv_format: str,
    parallelism: Parallelism = ONE_RANK,
    nvfp4_experts: bool = False,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield op_type, parameter (of linears) and sizes of each call in one layer; arguments as of `step_calls`."""
    model = rank_model(config, kv_format=kv_format, parallelism=parallelism, nvfp4_experts=nvfp4_experts)
    sizes, rest = static_sizes(model), _rest(model, shape)
    family, kind = family_of(config), config.layer_kind(layer)
    rows, tensors = family.layer_parameters(kind), family.layer_tensors(config, layer)
    if rest[MOE_EXPERTS.name]["S2"]:  # the shared expert is one more of the routed ones
        rows = tuple(one for one in rows if not one.shared)
    for op, what, bound in _linears(rows, tensors, shape.batch * shape.queries, parallelism):
        yield op, what, sizes[op] | bound
    sparse = _WITH_INDEXER if kind.has_indexer else _WITHOUT_INDEXER
    for op in (*(sparse if config.index_topk else _DENSE), *(_MOE if kind.is_moe else ())):
        if op in sizes and op in rest:
            yield op, "", sizes[op] | rest[op]


def end_calls(
    config: ModelConfig, shape: StepShape, *, kv_format: str, parallelism: Parallelism = ONE_RANK
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the same of the calls before the first layer and behind the last one: the head, for one token of each."""
    sizes, family = operators(config, kv_format=kv_format, parallelism=parallelism), family_of(config)
    ends = (*family.end_tensors(config)[0], *family.end_tensors(config)[1])
    for op, what, bound in _linears(family.end_parameters(), ends, shape.batch, parallelism):
        yield op, what, sizes[op] | bound


def _count(
    counts: dict[tuple[str, str, tuple[tuple[str, Any], ...]], int],
    op: str,
    what: str,
    bound: dict[str, Any],
    many: int,
) -> None:
    key = op, what, tuple(bound.items())
    counts[key] = counts.get(key, 0) + many


def _linears(
    parameters: Sequence[Parameter], tensors: Sequence[Tensor], rows: int, parallelism: Parallelism
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield operator, parameter and sizes of each linear and its norm among some parameters, in their order."""
    order = {parameter.module: place for place, parameter in enumerate(parameters)}
    norms = {parameter.module: parameter.norm for parameter in parameters if parameter.norm}
    linears = [
        (
            order[modules[0]],
            op,
            " + ".join(modules),
            {"*lead": (rows,), "N": n, "K": k} | ({"KB": k // FP8_BLOCK} if modules[0] in norms else {}),
        )
        for op in (BLOCK_FP8_LINEAR, BF16_LINEAR)
        for modules, (n, k) in joined_shapes_of(parameters, tensors, op, parallelism).items()
    ]
    widths = {tensor.name: tensor.shape[0] for tensor in tensors}
    for one in parameters:
        if one.op == ADD_RMS_NORM_QUANTIZE and one.name in norms.values():
            width = widths[one.name]
            bound = {"*lead": (rows,), "H": width, "R": width if one.adds else 0, "epsilon": 1.0}
            linears.append((order[one.module], ADD_RMS_NORM_QUANTIZE, one.module, bound))
    for _, op, what, bound in sorted(linears, key=lambda one: one[0]):
        yield op, what, bound


def _rest(model: RankModel, shape: StepShape) -> dict[str, dict[str, Any]]:
    """Return op_type -> sizes of the step, of operators that are no linears."""
    blocks = blocks_needed(shape.context)
    step = Step(
        batch=shape.batch,
        queries=shape.queries,
        num_blocks=blocks,
        expert_tokens=shape.batch * shape.queries,
        fp8_linears=(),
        bf16_linears=(),
    )
    pool = shape.batch * blocks + SCRAP_BLOCK + 1
    rows = (pool if model.kv_format == "fp8_ds" else pool * BLOCK_SIZE,)
    caches = {"*latent": rows, "*index": rows}
    return {op: one | caches | _ANY_SCALE for op, form in KERNEL_FORMS.items() for one in form.step_sizes(model, step)}
