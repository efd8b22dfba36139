"""FLOPs of a model by the precision that the reference multiplies in (spec §9.2)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from seekforge.exporter.sizing.matrices import Matrix, all_layers, all_matrices, num_indexers
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.plugins.dsa_indexer.operator import flops_per_key as indexer_flops_per_key
from seekforge.plugins.latent_attention import flops_per_key as attention_flops_per_key


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


def attention_flops(config: ModelConfig, keys: float, *, layers: Collection[int] | None = None) -> Flops:
    """FLOPs of attention (BF16) and of indexers' scores (FP8) for one token that sees `keys` keys.

    Args:
        config: the model.
        keys: how many there are.
        layers: the numbers of the layers; None: all of the main model.
    """
    layers = all_layers(config, mtp=False) if layers is None else layers
    core = attention_flops_per_key(config) * seen_keys(config, keys)
    return Flops(fp8=num_indexers(config, layers) * indexer_flops(config, keys), bf16=len(layers) * core)


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


def prefill_attention_flops(config: ModelConfig, prompt: int, *, layers: Collection[int] | None = None) -> Flops:
    """FLOPs of attention and indexers over a whole prompt: the sum over its tokens, each seeing those before it."""
    layers = all_layers(config, mtp=False) if layers is None else layers
    near = int(seen_keys(config, prompt))
    core_keys = near * (near + 1) / 2 + (prompt - near) * config.index_topk
    core = attention_flops_per_key(config) * core_keys
    scores = indexer_flops(config, prompt * (prompt + 1) / 2)
    return Flops(fp8=num_indexers(config, layers) * scores, bf16=len(layers) * core)
