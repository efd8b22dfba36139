"""Scratch memory of a model's operators in one step: what their launch plans ask for. No torch, no Triton, no file.

The shapes are those that an exported graph gives the operators (a test compares them), so what the planner counts and
what a build expects is what the plugins ask TensorRT for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import linear_shapes_of
from seekforge.formats.checkpoint.model_config import FP8_BLOCK, ModelConfig
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.kernels.launch_plan import SMS, workspace_bytes
from seekforge.plugins.operator import cdiv


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
    found: dict[str, int] = {}
    for op, shapes, attrs in _calls(config, batch, queries, context, kv_format, kernels.act_quant, tp, dp):
        found[op] = max(found.get(op, 0), workspace_bytes(op, shapes, attrs, kernels.sms))
    return found


def linear_shapes(config: ModelConfig, *, tp: int = 1) -> list[tuple[int, int]]:
    """Return (out features, in features) of each kind of `BlockFp8Linear` in a model, on one rank."""
    return _shapes(config, "BlockFp8Linear", tp)


def bf16_linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return (out features, in features) of each kind of `Bf16Linear` in a model; every rank has them whole."""
    return _shapes(config, "Bf16Linear", 1)


def _shapes(config: ModelConfig, op: str, tp: int) -> list[tuple[int, int]]:
    """Return the sizes of the matrices that an operator multiplies with, each once."""
    family = family_of(config)
    kinds = {config.is_moe_layer(layer): layer for layer in range(config.num_hidden_layers)}
    tables = [(family.layer_parameters(is_moe), family.layer_tensors(config, one)) for is_moe, one in kinds.items()]
    tables.append((family.end_parameters(), tuple(itertools.chain(*family.end_tensors(config)))))
    return list(dict.fromkeys(shape for rows, tensors in tables for shape in linear_shapes_of(rows, tensors, op, tp)))


def _calls(
    config: ModelConfig, batch: int, queries: int, context: int, kv_format: str, act_quant: str, tp: int, dp: int
) -> Iterator[tuple[str, list[tuple[int, ...]], dict[str, Any]]]:
    """Yield the operators that work in scratch memory, with shapes and attributes."""
    c, blocks = config, cdiv(context, BLOCK_SIZE)
    quant = {"act_quant": act_quant}
    for n, k in linear_shapes(c, tp=tp):
        yield "BlockFp8Linear", [(batch, queries, k), (n, k), (cdiv(n, FP8_BLOCK), cdiv(k, FP8_BLOCK))], quant
    for n, k in bf16_linear_shapes(c):
        yield "Bf16Linear", [(batch * queries, k), (n, k)], {}
    pool = (BLOCK_SIZE,)  # how many slots the caches have does not matter
    yield (
        "DsaIndexer",
        [
            (batch, queries, c.index_n_heads, c.index_head_dim), (batch, queries, c.index_n_heads),
            (*pool, c.index_head_dim), (batch, blocks), (batch, queries),
        ],
        {"index_topk": c.index_topk, "indexer_fp8": kv_format == "fp8_ds", "index_format": kv_format},
    )  # fmt: skip
    heads = c.num_attention_heads // tp
    yield (
        "DsaAttention",
        [
            (batch, queries, heads, c.kv_lora_rank), (batch, queries, heads, c.qk_rope_head_dim),
            (*pool, c.latent_dim), (batch, blocks), (batch, queries, c.index_topk),
        ],
        {"scale": 1.0, "kv_format": kv_format},
    )  # fmt: skip
    tokens, experts = batch * queries * dp, cdiv(c.n_routed_experts, tp * dp)
    hidden, inner, topk = c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    yield (
        "MoeExperts",
        [
            (tokens, hidden), (tokens, topk), (tokens, topk),
            (experts, 2 * inner, hidden), (experts, cdiv(2 * inner, FP8_BLOCK), cdiv(hidden, FP8_BLOCK)),
            (experts, hidden, inner), (experts, cdiv(hidden, FP8_BLOCK), cdiv(inner, FP8_BLOCK)),
        ],
        quant,
    )  # fmt: skip
