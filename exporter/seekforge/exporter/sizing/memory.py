"""Bytes and FLOPs of a model from its config and its family's table. Pure arithmetic: no torch, no GPU, no file.

The runtime sizes its cache with it, `build` decides whether an engine fits, `plan` shows it. Formulas are those of
spec §2.4, §7.3 and §9, and tests hold them against the numbers there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import EXPERT, Sharding, Tensor
from seekforge.exporter.sizing.scratch import ANY_KERNELS, Kernels, step_scratch_bytes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8_BLOCK
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.parallelism import Parallelism
from seekforge.plugins.dsa_indexer.operator import flops_per_key as indexer_flops_per_key
from seekforge.plugins.dsa_indexer.spec import SPEC as DSA_INDEXER
from seekforge.plugins.latent_attention import flops_per_key as attention_flops_per_key

Precision = Literal["fp8", "bf16"]
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


@dataclass(frozen=True)
class Matrix:
    """One or several equal parameter tensors.

    Attributes:
        name: name of the module, or of the tensor where it is no weight; below its layer.
        rows, cols: out and in features; cols 1 for a vector.
        dtype: f8e4m3 (with f32 scales of 128×128 blocks), bf16 or f32.
        sharding: what divides it.
        count: how many; experts.
        active: how many of them one token multiplies with; 0 for what is no matrix product.
        held: the type in which engines hold it, and multiply with it, where that is another.
        is_head: whether only rows that get logits are multiplied with it.
    """

    name: str
    rows: int
    cols: int
    dtype: Literal["f8e4m3", "bf16", "f32"]
    sharding: Sharding = "none"
    count: int = 1
    active: int = 1
    held: Literal["bf16", "f32"] | None = None
    is_head: bool = False

    @property
    def elements(self) -> int:
        """Parameters, all copies."""
        return self.rows * self.cols * self.count

    @property
    def scales(self) -> int:
        """f32 scales, all copies."""
        blocks = -(-self.rows // FP8_BLOCK) * -(-self.cols // FP8_BLOCK)
        return blocks * self.count if self.dtype == "f8e4m3" else 0

    def num_bytes(self, precision: Precision = "fp8") -> int:
        """Bytes of all copies; with `bf16`, FP8 weights are held dequantized."""
        if self.dtype == "f8e4m3":
            return self.elements + 4 * self.scales if precision == "fp8" else 2 * self.elements
        return self.elements * (2 if self.dtype == "bf16" else 4)


def _matrices(tensors: Iterable[Tensor]) -> list[Matrix]:
    """Return rows of a family's table as matrices, but for copies of others."""
    return [
        Matrix(
            one.module.replace(f".{EXPERT}", ""),
            one.shape[0],
            one.shape[1] if len(one.shape) == 2 else 1,
            one.dtype,
            one.sharding,
            one.count,
            one.active,
            one.held,
            one.is_head,
        )
        for one in tensors
        if one.copy_of is None
    ]


def layer_matrices(config: ModelConfig, layer: int) -> list[Matrix]:
    """Return the parameters of a layer as the checkpoint holds them (spec §2.3), MTP extras included."""
    return _matrices(family_of(config).layer_tensors(config, layer))


def end_matrices(config: ModelConfig) -> tuple[list[Matrix], list[Matrix]]:
    """Return the parameters before the first layer and those behind the last one."""
    first, last = family_of(config).end_tensors(config)
    return _matrices(first), _matrices(last)


def all_matrices(config: ModelConfig, *, mtp: bool) -> Iterator[Matrix]:
    """All parameters, each once: embedding and head are shared with the MTP module."""
    first, last = end_matrices(config)
    yield from first
    for layer in range(config.num_hidden_layers):
        yield from layer_matrices(config, layer)
    yield from last
    if mtp and config.mtp_layer is not None:
        yield from layer_matrices(config, config.mtp_layer)


def num_parameters(config: ModelConfig, *, mtp: bool = False) -> int:
    """Parameters without scales (spec §9.1)."""
    return sum(matrix.elements for matrix in all_matrices(config, mtp=mtp))


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets in the main model, embedding and head included (spec §9.1)."""
    return sum(
        matrix.rows * matrix.cols * (matrix.active if matrix.sharding == "experts" else matrix.count)
        for matrix in all_matrices(config, mtp=False)
    )


def checkpoint_bytes(config: ModelConfig) -> int:
    """Tensor bytes of the whole checkpoint, whose MTP layer carries its own embedding and head (spec §2.4)."""
    copied = set(family_of(config).mtp_copies(config).values())
    copies = [matrix for matrices in end_matrices(config) for matrix in matrices if f"{matrix.name}.weight" in copied]
    return sum(matrix.num_bytes() for matrix in (*all_matrices(config, mtp=True), *copies))


def weight_bytes(config: ModelConfig, *, mtp: bool = False, precision: Precision = "fp8") -> int:
    """Weight bytes that engines hold on one GPU, see `held_bytes`."""
    return sum(held_bytes(matrix, precision) for matrix in all_matrices(config, mtp=mtp))


def held_bytes(matrix: Matrix, precision: Precision) -> int:
    """Bytes of a matrix as an engine holds it.

    What is multiplied stays BF16 even where a step gives f32 results: `Bf16Linear` does both (spec §5.3).
    """
    if matrix.held == "f32":
        return 4 * matrix.elements
    return matrix.num_bytes(precision if matrix.held is None else "bf16")


# --- cache ----------------------------------------------------------------------------------------------------


def cache_bytes_per_token(config: ModelConfig, kv_format: KvFormat, *, num_layers: int | None = None) -> int:
    """Bytes of latent and indexer key per token (spec §7.3).

    Args:
        config: the model.
        kv_format: `fp8_ds`: 656 + 132 bytes at V3.2's sizes; bf16 and f32: both keys in that type.
        num_layers: layers with a cache; None: all of the main model.
    """
    layers = config.num_hidden_layers if num_layers is None else num_layers
    if kv_format == "fp8_ds":
        latent = config.kv_lora_rank + 4 * -(-config.kv_lora_rank // FP8_BLOCK) + 2 * config.qk_rope_head_dim
        return layers * (latent + (config.index_head_dim + 4 if config.index_head_dim else 0))
    return layers * (config.latent_dim + config.index_head_dim) * (2 if kv_format == "bf16" else 4)


def cache_bytes(config: ModelConfig, kv_format: KvFormat, *, context: int, batch: int, num_layers: int) -> int:
    """Bytes for `batch` sequences of `context` tokens in whole blocks, and the scrap block."""
    blocks = batch * -(-context // BLOCK_SIZE) + 1
    return blocks * BLOCK_SIZE * cache_bytes_per_token(config, kv_format, num_layers=num_layers)


# --- FLOPs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """FLOPs by the precision that the reference multiplies in (2 per multiply and add)."""

    fp8: float = 0.0
    bf16: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.fp8 + other.fp8, self.bf16 + other.bf16)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.fp8 * factor, self.bf16 * factor)

    @property
    def total(self) -> float:
        """Both together."""
        return self.fp8 + self.bf16


def linear_flops(config: ModelConfig, matrices: Sequence[Matrix] | None = None) -> Flops:
    """FLOPs of all matrix products with weights for one token of the main model, head included (spec §9.2).

    Args:
        config: the model.
        matrices: these only; None: the whole main model.
    """
    total = Flops()
    for matrix in all_matrices(config, mtp=False) if matrices is None else matrices:
        work = 2.0 * matrix.rows * matrix.cols * matrix.active
        is_fp8 = matrix.dtype == "f8e4m3" and matrix.held is None
        total += Flops(fp8=work) if is_fp8 else Flops(bf16=work)
    return total


def attention_flops(config: ModelConfig, keys: float, *, num_layers: int | None = None) -> Flops:
    """FLOPs of attention (BF16) and of the indexer's scores (FP8) for one token that sees `keys` keys."""
    layers = config.num_hidden_layers if num_layers is None else num_layers
    core = attention_flops_per_key(config) * seen_keys(config, keys)
    return Flops(fp8=layers * indexer_flops(config, keys), bf16=layers * core)


def seen_keys(config: ModelConfig, keys: float) -> float:
    """Return how many of `keys` keys a token attends to: what an indexer chooses, or all."""
    return min(keys, config.index_topk) if config.index_topk else keys


def indexer_flops(config: ModelConfig, keys: float) -> float:
    """FLOPs of one layer's indexer scores for one token."""
    return indexer_flops_per_key(config) * keys


def dense_attention_flops(config: ModelConfig, keys: float, *, absorbed: bool) -> float:
    """What attention over all keys would cost, for comparison (spec §9.2)."""
    width = config.latent_dim + config.kv_lora_rank if absorbed else config.qk_head_dim + config.v_head_dim
    return 2.0 * config.num_hidden_layers * config.num_attention_heads * width * keys


def prefill_attention_flops(config: ModelConfig, prompt: int, *, num_layers: int | None = None) -> Flops:
    """FLOPs of attention and indexer over a whole prompt: the sum over its tokens, each seeing those before it."""
    layers = config.num_hidden_layers if num_layers is None else num_layers
    near = int(seen_keys(config, prompt))
    core_keys = near * (near + 1) / 2 + (prompt - near) * config.index_topk
    core = attention_flops_per_key(config) * core_keys
    return Flops(fp8=layers * indexer_flops(config, prompt * (prompt + 1) / 2), bf16=layers * core)


# --- one rank -------------------------------------------------------------------------------------------------


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


def rank_share(matrix: Matrix, parallelism: Parallelism) -> int:
    """Return into how many equal parts ranks divide a matrix, or all of its copies."""
    return 1 if matrix.sharding == "none" else parallelism.tp


def rank_weight_bytes(matrix: Matrix, parallelism: Parallelism, precision: Precision) -> int:
    """Bytes of a matrix on one rank."""
    return held_bytes(matrix, precision) // rank_share(matrix, parallelism)


def pipeline_stages(config: ModelConfig, parallelism: Parallelism) -> tuple[tuple[int, int], ...]:
    """Return the half-open layer range of each pipeline stage; cuts keep the fullest stage least full.

    What counts is the FP8 weights of a rank, the MTP module on the last stage included where the model has one: the
    same stages for every precision and every use of the model, since a program has them.
    """
    return _cut(config, parallelism)  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=1024)
def _cut(config: ModelConfig, parallelism: Parallelism) -> tuple[tuple[int, int], ...]:
    num_layers, pp = config.num_hidden_layers, parallelism.pp
    if pp == 1:
        return ((0, num_layers),)
    mtp = config.mtp_layer is not None
    weights = [_stage_bytes(config, (n, n + 1), parallelism, "fp8", mtp=mtp) for n in range(num_layers)]
    low, high = max(weights), sum(weights)
    while low < high:
        limit = (low + high) // 2
        if _count_stages(weights, limit) <= pp:
            high = limit
        else:
            low = limit + 1
    result: list[tuple[int, int]] = []
    start = 0
    while start < num_layers:
        stop, total = start, 0
        left = pp - len(result) - 1  # stages after this one need a layer each
        while stop < num_layers - left and total + weights[stop] <= low:
            total += weights[stop]
            stop += 1
        result.append((start, stop))
        start = stop
    return tuple(result)


def stages(
    config: ModelConfig, parallelism: Parallelism, precision: Precision, *, mtp: bool
) -> list[tuple[range, int]]:
    """Return each pipeline stage's layers and weight bytes per rank."""
    cut = pipeline_stages(config, parallelism)
    return [(range(*layers), _cached_bytes(config, layers, parallelism, precision, mtp)) for layers in cut]  # pyright: ignore[reportArgumentType] - frozen, so hashable


@functools.lru_cache(maxsize=4096)
def _cached_bytes(
    config: ModelConfig, layers: tuple[int, int], parallelism: Parallelism, precision: Precision, mtp: bool
) -> int:
    return _stage_bytes(config, layers, parallelism, precision, mtp=mtp)


def _stage_bytes(
    config: ModelConfig, layers: tuple[int, int], parallelism: Parallelism, precision: Precision, *, mtp: bool
) -> int:
    """Bytes on one rank of some layers, and of the ends of the model where they are among them."""
    first, last = end_matrices(config)
    matrices = [matrix for layer in range(*layers) for matrix in layer_matrices(config, layer)]
    if layers[0] == 0:
        matrices += first
    if layers[1] == config.num_hidden_layers:
        matrices += last
        if mtp and config.mtp_layer is not None:
            matrices += layer_matrices(config, config.mtp_layer)
            if layers[0] > 0:
                matrices += first  # the MTP module embeds tokens too
    return sum(rank_weight_bytes(matrix, parallelism, precision) for matrix in matrices)


def _count_stages(weights: Sequence[int], limit: int) -> int:
    count, total = 1, 0
    for weight in weights:
        if total + weight > limit:
            count, total = count + 1, 0
        total += weight
    return count


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
    """Logits of a decode step, which a runtime holds beside what plans share, twice."""
    return -(-work.batch // parallelism.dp) * (1 + work.draft_tokens) * config.vocab_size * 4 * 2


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
        cached = len(layers) + (1 if mtp and config.mtp_layer is not None and number == len(cut) - 1 else 0)
        cache = cache_bytes(config, kv_format, context=work.context, batch=per_rank, num_layers=cached)
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
