"""Scratch memory of a model's operators in one step: what their launch plans ask for, or their bodies hold.

No torch, no Triton, no file.

The sizes are those that an exported graph gives the operators (a test compares them), so what the planner counts and
what a build expects is what the plugins ask TensorRT for.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Final

from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import joined_shapes_of, linear_shapes_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.plugins.kernels.launch_plan import bound_workspace_bytes
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.operator import RankModel, Step, cdiv
from seekforge.plugins.registry import BF16_LINEAR, BLOCK_FP8_LINEAR, KERNEL_FORMS, OPERATORS


@dataclass(frozen=True)
class Kernels:
    """Which kernels run a model.

    Attributes:
        sms: SMs for which they are compiled.
        act_quant: what the program's numerics say of activations.
        inlined: op_types that run as standard operators instead.
        nvfp4_experts: whether experts have their weights in NVFP4.
    """

    sms: tuple[int, ...] = SMS
    act_quant: str = "ue8m0"
    inlined: frozenset[str] = frozenset()
    nvfp4_experts: bool = False


#: Whatever the GPU, with the numerics of the official reference.
ANY_KERNELS: Final = Kernels()


def step_scratch_bytes(
    config: ModelConfig,
    batch: int,
    queries: int,
    *,
    context: int,
    kv_format: str,
    kernels: Kernels = ANY_KERNELS,
    parallelism: Parallelism = ONE_RANK,
) -> dict[str, int]:
    """Return op_type -> the most scratch of one call of it on one rank, in steps that are no larger.

    Args:
        config: the model.
        batch, queries: sequences of a replica, and new tokens of each.
        context: positions of the longest sequence.
        kv_format: format of the caches.
        kernels: those that run it.
        parallelism: how ranks share the model.
    """
    return dict(_step(config, batch, queries, context, kv_format, kernels, parallelism))  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=4096)
def _step(
    config: ModelConfig,
    batch: int,
    queries: int,
    context: int,
    kv_format: str,
    kernels: Kernels,
    parallelism: Parallelism,
) -> dict[str, int]:
    fp8_caches = kv_format == "fp8_ds"
    model = RankModel(
        config=config,
        numerics={"act_quant": kernels.act_quant, "kv_fp8": fp8_caches, "indexer_fp8": fp8_caches},
        kv_format=kv_format,
        parallelism=parallelism,
        nvfp4_experts=kernels.nvfp4_experts,
    )
    step = Step(
        batch=batch,
        queries=queries,
        num_blocks=cdiv(context, BLOCK_SIZE),
        expert_tokens=batch * queries,
        fp8_linears=linear_shapes(config, parallelism),
        bf16_linears=bf16_linear_shapes(config, parallelism),
    )
    scratch = {}
    for op, form in KERNEL_FORMS.items():
        static = form.static_sizes(model)
        calls = (static | sizes for sizes in form.step_sizes(model, step))
        scratch[op] = max((bound_workspace_bytes(op, call, kernels.sms) for call in calls), default=0)
    for op, operator in OPERATORS.items():
        if op in kernels.inlined and operator.inlined_scratch is not None:
            scratch[op] = operator.inlined_scratch(model, step)
    return scratch


def linear_shapes(config: ModelConfig, parallelism: Parallelism = ONE_RANK) -> list[tuple[int, int]]:
    """Return (out features, in features) of each kind of `BlockFp8Linear` of a model, on one rank: joined and apart."""
    return list(_shapes(config, BLOCK_FP8_LINEAR, parallelism))  # pyright: ignore[reportArgumentType] - frozen, so hashable


def bf16_linear_shapes(config: ModelConfig, parallelism: Parallelism = ONE_RANK) -> list[tuple[int, int]]:
    """Return (out features, in features) of each kind of `Bf16Linear` in a model, on one rank."""
    return list(_shapes(config, BF16_LINEAR, parallelism))  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=256)
def _shapes(config: ModelConfig, op: str, parallelism: Parallelism) -> tuple[tuple[int, int], ...]:
    """Return the sizes of the matrices that an operator multiplies with, each once, those of joined ones first."""
    family = family_of(config)
    kinds = {config.layer_kind(layer): layer for layer in range(config.num_hidden_layers)}
    tables = [(family.layer_parameters(kind), family.layer_tensors(config, one)) for kind, one in kinds.items()]
    tables.append((family.end_parameters(), tuple(itertools.chain(*family.end_tensors(config)))))
    joined = (joined_shapes_of(rows, tensors, op, parallelism).values() for rows, tensors in tables)
    apart = (linear_shapes_of(rows, tensors, op, parallelism) for rows, tensors in tables)
    return tuple(dict.fromkeys(itertools.chain.from_iterable((*joined, *apart))))
