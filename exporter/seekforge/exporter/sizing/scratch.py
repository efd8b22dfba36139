"""Scratch memory of a model's operators in one step: what their launch plans ask for. No torch, no Triton, no file.

The sizes are those that an exported graph gives the operators (a test compares them), so what the planner counts and
what a build expects is what the plugins ask TensorRT for.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Final

from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import linear_shapes_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.kernels.launch_plan import SMS, bound_workspace_bytes
from seekforge.plugins.operator import RankModel, Step, cdiv
from seekforge.plugins.registry import BF16_LINEAR, BLOCK_FP8_LINEAR, KERNEL_FORMS


@dataclass(frozen=True)
class Kernels:
    """Which kernels run a model.

    Attributes:
        sms: that they are compiled for.
        act_quant: of the program's numerics.
    """

    sms: tuple[int, ...] = SMS
    act_quant: str = "ue8m0"


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
    tp: int = 1,
    dp: int = 1,
) -> dict[str, int]:
    """Return op_type -> the most scratch of one call of it on one rank, in steps that are no larger.

    Args:
        config: of the model.
        batch, queries: sequences of a replica, and new tokens of each.
        context: positions of the longest sequence.
        kv_format: of both caches.
        kernels: that run it.
        tp: ranks that divide heads and the MLPs.
        dp: replicas of attention; the experts are divided over all tp·dp ranks and see the tokens of all replicas.
    """
    return dict(_step(config, batch, queries, context, kv_format, kernels, tp, dp))  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=4096)
def _step(
    config: ModelConfig, batch: int, queries: int, context: int, kv_format: str, kernels: Kernels, tp: int, dp: int
) -> dict[str, int]:
    fp8_caches = kv_format == "fp8_ds"
    model = RankModel(
        config=config,
        numerics={"act_quant": kernels.act_quant, "kv_fp8": fp8_caches, "indexer_fp8": fp8_caches},
        kv_format=kv_format,
        num_heads=config.num_attention_heads // tp,
        num_experts=cdiv(config.n_routed_experts, tp * dp),
        moe_intermediate_size=config.moe_intermediate_size,
    )
    step = Step(
        batch=batch,
        queries=queries,
        num_blocks=cdiv(context, BLOCK_SIZE),
        expert_tokens=batch * queries * dp,
        fp8_linears=linear_shapes(config, tp=tp),
        bf16_linears=bf16_linear_shapes(config),
    )
    scratch = {}
    for op, form in KERNEL_FORMS.items():
        static = form.static_sizes(model)
        calls = (static | sizes for sizes in form.step_sizes(model, step))
        scratch[op] = max((bound_workspace_bytes(op, call, kernels.sms) for call in calls), default=0)
    return scratch


def linear_shapes(config: ModelConfig, *, tp: int = 1) -> list[tuple[int, int]]:
    """Return (out features, in features) of each kind of `BlockFp8Linear` in a model, on one rank."""
    return list(_shapes(config, BLOCK_FP8_LINEAR, tp))  # pyright: ignore[reportArgumentType] - frozen, so hashable


def bf16_linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return (out features, in features) of each kind of `Bf16Linear` in a model; every rank has them whole."""
    return list(_shapes(config, BF16_LINEAR, 1))  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=256)
def _shapes(config: ModelConfig, op: str, tp: int) -> tuple[tuple[int, int], ...]:
    """Return the sizes of the matrices that an operator multiplies with, each once."""
    family = family_of(config)
    kinds = {config.is_moe_layer(layer): layer for layer in range(config.num_hidden_layers)}
    tables = [(family.layer_parameters(is_moe), family.layer_tensors(config, one)) for is_moe, one in kinds.items()]
    tables.append((family.end_parameters(), tuple(itertools.chain(*family.end_tensors(config)))))
    return tuple(dict.fromkeys(shape for rows, tensors in tables for shape in linear_shapes_of(rows, tensors, op, tp)))
