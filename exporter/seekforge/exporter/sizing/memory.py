"""Bytes on one GPU: weights, caches, scratch memory and activations. Pure arithmetic: no torch, no GPU, no file.

`build` decides with it whether an engine fits, `plan` shows it. Formulas are those of spec §7.3 and §9, and tests
hold them against the numbers there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from seekforge.exporter.sizing.matrices import Precision, all_layers, num_indexers
from seekforge.exporter.sizing.scratch import ANY_KERNELS, Kernels, step_scratch_bytes
from seekforge.exporter.sizing.stages import stages
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.paged_cache import BLOCK_SIZE, index_row_bytes, latent_row_bytes
from seekforge.formats.parallelism import Parallelism
from seekforge.plugins.dsa_indexer.spec import SPEC as DSA_INDEXER

KvFormat = Literal["f32", "bf16", "fp8_ds"]

GIB = 1 << 30
#: What a rank needs beside weights, cache and scratch: CUDA context and libraries, captured graphs (of one shape each),
#: communication buffers when there is more than one rank, and a share of memory that the allocator cannot use.
CONTEXT_BYTES = 3 * GIB // 4
GRAPH_BYTES = 1 * GIB
COMMUNICATION_BYTES = 1 * GIB // 2
UNUSABLE_SHARE = 0.02
#: What TensorRT-RTX 1.7 keeps for its own matrix products, whatever their size, and a half more for splits of K.
PRODUCT_BYTES = 12 << 20
#: Tokens that one step may hold, in one prefill, when nothing else is said.
DEFAULT_STEP_TOKENS = 2048


def cache_bytes_per_token(config: ModelConfig, kv_format: KvFormat, *, layers: Collection[int] | None = None) -> int:
    """Bytes of latents and indexer keys per token (spec §7.3).

    Args:
        config: the model.
        kv_format: `fp8_ds`: 656 + 132 bytes at V3.2's sizes; bf16 and f32: both keys in that type.
        layers: layers with a cache; None: all of the main model.
    """
    layers = all_layers(config, mtp=False) if layers is None else layers
    latent, index = cache_row_bytes(config, kv_format)
    return len(layers) * latent + num_indexers(config, layers) * index


def cache_row_bytes(config: ModelConfig, kv_format: KvFormat) -> tuple[int, int]:
    """Return the bytes that one token takes in one layer's caches: its latent, and its key where an indexer is."""
    latent = latent_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim, kv_format)
    return latent, index_row_bytes(config.index_head_dim, kv_format)


def cache_bytes(config: ModelConfig, kv_format: KvFormat, *, context: int, batch: int, layers: Collection[int]) -> int:
    """Bytes for `batch` sequences of `context` tokens in whole blocks, and the scrap block."""
    blocks = batch * -(-context // BLOCK_SIZE) + 1
    return blocks * BLOCK_SIZE * cache_bytes_per_token(config, kv_format, layers=layers)


@dataclass(frozen=True)
class Workload:
    """What is to be served.

    Attributes:
        context: tokens of each sequence, prompt and answer.
        batch: sequences at once, over all replicas.
        step_tokens: most tokens of one prefill step.
        draft_tokens: tokens that MTP drafts per step; 0 without.
    """

    context: int
    batch: int = 1
    step_tokens: int = DEFAULT_STEP_TOKENS
    draft_tokens: int = 0


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU of the fullest rank; each part is counted once.

    Attributes:
        weights: those of the rank, MTP module included where it is asked for.
        cache: latents and indexer keys.
        indexer_scores: scores of the indexer, part of the scratch memory that operators share.
        scratch: how much longer that shared memory is for the greediest operator.
        activations: see `activation_bytes`.
        graphs: captured CUDA graphs.
        cuda_context: CUDA and its libraries.
        communication: buffers between ranks; 0 where a replica has one.
    """

    weights: int
    cache: int
    indexer_scores: int
    scratch: int
    activations: int
    graphs: int
    cuda_context: int
    communication: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


def reserve_bytes(parallelism: Parallelism) -> int:
    """What the runtime keeps for CUDA, graphs and communication."""
    return CONTEXT_BYTES + GRAPH_BYTES + communication_bytes(parallelism)


def communication_bytes(parallelism: Parallelism) -> int:
    """Buffers between the ranks of a replica."""
    return COMMUNICATION_BYTES if parallelism.num_ranks > 1 else 0


def scratch_bytes(
    config: ModelConfig,
    parallelism: Parallelism,
    work: Workload,
    kv_format: KvFormat,
    *,
    kernels: Kernels = ANY_KERNELS,
) -> int:
    """Scratch memory of the greediest operator in a prefill of one sequence and in a decode step of all.

    Operators run one after another, so their scratch memory is shared.
    """
    return max(operator_scratch_bytes(config, parallelism, work, kv_format, kernels=kernels).values())


def operator_scratch_bytes(
    config: ModelConfig,
    parallelism: Parallelism,
    work: Workload,
    kv_format: KvFormat,
    *,
    kernels: Kernels = ANY_KERNELS,
    steps: Sequence[tuple[int, int]] | None = None,
) -> dict[str, int]:
    """Scratch memory that each operator asks for on one rank, by its name; the most over all steps.

    Args:
        config, parallelism, work: what runs where.
        kv_format: format of the caches.
        kernels: those that run it.
        steps: largest (sequences of a replica, new tokens of each) of each kind of step; None: one prefill and one
            decode step of the workload.
    """
    if steps is None:
        steps = ((1, min(work.step_tokens, work.context)), (-(-work.batch // parallelism.dp), 1 + work.draft_tokens))
    per_step = [
        step_scratch_bytes(
            config,
            batch,
            queries,
            context=work.context,
            kv_format=kv_format,
            kernels=kernels,
            parallelism=parallelism,
        )
        for batch, queries in steps
    ]
    return {op: max(one[op] for one in per_step) for op in per_step[0]}


def activation_bytes(config: ModelConfig, parallelism: Parallelism, work: Workload) -> int:
    """Activations that live at once in the widest place of a step, and the logits of a decode step. An estimate.

    The residual stream is counted ten times in bf16: as a layer takes it and as it hands it on, two values each, and
    normed, summed in f32 and copied between. Beside it is the widest of three places. Attention: queries of all heads,
    absorbed ones twice (in the order of the product and in that of the operator), outputs. Indexer: queries of all
    heads, its own in bf16 and twice in f32. MLP: gate and up in bf16 and f32. TensorRT's own products have a workspace,
    and those of a single token per head copy their weight. What TensorRT says of its plans is held against this by a
    test.
    """
    rank, per_rank = parallelism.rank_sizes(config), -(-work.batch // parallelism.dp)
    heads = rank.num_attention_heads
    tokens = max(min(work.step_tokens, work.context), per_rank * (1 + work.draft_tokens))
    attention = heads * (config.qk_head_dim + 2 * config.kv_lora_rank + config.v_head_dim) * 2
    indexer = heads * config.qk_head_dim * 2 + config.index_n_heads * config.index_head_dim * (2 + 4 + 4)
    mlp = max(rank.intermediate_size, rank.shared_intermediate_size) * 2 * 6
    stream = config.hidden_size * 2 * 10
    products = PRODUCT_BYTES + heads * max(config.qk_nope_head_dim, config.v_head_dim) * config.kv_lora_rank * 2
    return (
        tokens * (stream + max(attention, indexer, mlp) + selection_bytes(config))
        + products
        + logits_bytes(config, parallelism, work)
    )


def logits_bytes(config: ModelConfig, parallelism: Parallelism, work: Workload) -> int:
    """Logits of a decode step, which a runtime holds beside what plans share, twice. Ranks that divide the vocabulary
    have their part besides, alone and among zeros."""
    divided = parallelism.rank_sizes(config).vocab_size + config.vocab_size
    width = 2 * config.vocab_size + (divided if parallelism.divides_vocabulary(config) else 0)
    return -(-work.batch // parallelism.dp) * (1 + work.draft_tokens) * width * 4


def selection_bytes(config: ModelConfig) -> int:
    """Bytes per token of what one layer chooses, keys and experts, which every engine gives as outputs."""
    return (config.index_topk + config.num_experts_per_tok) * 4


def rank_memory(
    config: ModelConfig,
    parallelism: Parallelism,
    work: Workload,
    *,
    precision: Precision,
    kv_format: KvFormat,
    mtp: bool,
    kernels: Kernels = ANY_KERNELS,
    steps: Sequence[tuple[int, int]] | None = None,
) -> RankMemory:
    """Return the bytes of the fullest rank; `kernels` and `steps` are those of `operator_scratch_bytes`."""
    cut = stages(config, parallelism, precision, mtp=mtp)
    per_rank = -(-work.batch // parallelism.dp)
    fullest: tuple[int, int] | None = None
    for number, (layers, weights) in enumerate(cut):
        drafts = [config.mtp_layer] if mtp and config.mtp_layer is not None and number == len(cut) - 1 else []
        cache = cache_bytes(config, kv_format, context=work.context, batch=per_rank, layers=[*layers, *drafts])
        if fullest is None or weights + cache > sum(fullest):
            fullest = (weights, cache)
    assert fullest is not None
    scratch = operator_scratch_bytes(config, parallelism, work, kv_format, kernels=kernels, steps=steps)
    scores = scratch[DSA_INDEXER.name]
    return RankMemory(
        weights=fullest[0],
        cache=fullest[1],
        indexer_scores=scores,
        scratch=max(scratch.values()) - scores,
        activations=activation_bytes(config, parallelism, work),
        graphs=GRAPH_BYTES,
        cuda_context=CONTEXT_BYTES,
        communication=communication_bytes(parallelism),
    )


def usable_bytes(memory_gib: float) -> int:
    """What an engine may use of a GPU with `memory_gib` GiB."""
    return math.floor(memory_gib * GIB * (1 - UNUSABLE_SHARE))
