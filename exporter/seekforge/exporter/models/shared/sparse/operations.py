"""The operations of a layer with sparse attention (see `models.shared.layer_operations`)."""

from __future__ import annotations

from torch import Tensor

from seekforge.exporter.models.shared import latent_operations
from seekforge.exporter.models.shared.layer_operations import LayerModule, LayerState, Op, Values
from seekforge.exporter.models.shared.mlp_operations import mlp_operations
from seekforge.plugins.dsa_attention.reference import dsa_attention
from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.dsa_indexer.reference import dsa_indexer, index_scores
from seekforge.plugins.mla_cache_write.reference import mla_cache_write


def cached(owner: LayerModule) -> tuple[str, ...]:
    """Return the points that `write_cache` reads."""
    return ("kv_latent", "k_pe") if owner.module.self_attn.indexer is None else ("kv_latent", "k_pe", "index_k")


def before_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations up to the cache write."""
    attention, step = owner.module.self_attn, state.step
    if attention.indexer is None:
        return latent_operations.before_cache(owner, state)
    start = attention.splits[0]
    stop = start + attention.splits[1]
    return [
        *latent_operations.before_cache(owner, state, (("indexer.wk", "index key"),)),
        Op(
            "self_attn.indexer.k_norm",
            "LayerNorm of the index key",
            ("qkv_a",),
            "index_k_norm",
            lambda v: attention.indexer.k_norm(v["qkv_a"][..., start:stop]),
            owner.tensors("self_attn.indexer.k_norm"),
        ),
        Op(
            "self_attn.indexer (rotation of keys)",
            "RoPE and Hadamard of the index key",
            ("index_k_norm",),
            "index_k",
            lambda v: attention.indexer.rotate(v["index_k_norm"], step),
        ),
    ]


def write_cache(owner: LayerModule, state: LayerState, values: Values) -> None:
    """Put this step's rows into the caches of `state`."""
    numerics, kv = owner.settings.numerics, owner.settings.cache_dtype_name
    if owner.module.self_attn.indexer is None:
        state.caches["latent_cache"] = mla_cache_write(
            state.caches["latent_cache"],
            values["kv_latent"],
            values["k_pe"],
            state.step.slot_mapping,
            kv,
            numerics.kv_fp8,
        )
        return
    state.caches["latent_cache"], state.caches["index_cache"] = dsa_cache_write(
        state.caches["latent_cache"],
        state.caches["index_cache"],
        values["kv_latent"],
        values["k_pe"],
        values["index_k"],
        state.step.slot_mapping,
        kv,
        kv,
        numerics.kv_fp8,
        numerics.indexer_fp8,
    )


def key_scores(owner: LayerModule, state: LayerState, values: Values) -> Tensor:
    """Return [B, Q, L] scores by which the indexer chooses keys; -inf where a key is not visible."""
    return index_scores(
        values["index_q"],
        values["index_w"],
        state.caches["index_cache"],
        state.step.block_table,
        state.step.positions,
        owner.settings.numerics.indexer_fp8,
        owner.settings.cache_dtype_name,
    )


def behind_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations behind the cache write: indexer, if the layer has one, attention and MLP."""
    config, step, kv = owner.config, state.step, owner.settings.cache_dtype_name
    return [
        *(_choice(owner, state) if owner.module.self_attn.indexer is not None else ()),
        Op(
            "self_attn (sparse attention)",
            "softmax over the chosen keys",
            ("q_latent", "q_pe", "topk_indices"),
            "o_latent",
            lambda v: dsa_attention(
                v["q_latent"],
                v["q_pe"],
                state.caches["latent_cache"],
                step.block_table,
                v["topk_indices"],
                config.softmax_scale,
                kv,
            ),
        ),
        *latent_operations.output(owner),
        *mlp_operations(owner, state),
    ]


def _choice(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations of the indexer behind the cache write."""
    indexer = owner.module.self_attn.indexer
    config, numerics, step = owner.config, owner.settings.numerics, state.step
    kv = owner.settings.cache_dtype_name

    def index_q(v: Values) -> Tensor:
        return indexer.rotate(v["wq_b"], step, config.index_n_heads)

    return [
        owner.apply("self_attn.indexer.wq_b", "index queries", "q_a_norm", "wq_b", indexer.wq_b),
        Op(
            "self_attn.indexer (rotation of queries)",
            "RoPE and Hadamard of the index queries",
            ("wq_b",),
            "index_q",
            index_q,
        ),
        owner.apply(
            "self_attn.indexer.weights_proj",
            "weights of the index heads",
            "attn_norm",
            "index_w",
            indexer.head_weights,
        ),
        Op(
            "self_attn.indexer (selection)",
            "scores, and the best index_topk keys",
            ("index_q", "index_w"),
            "topk_indices",
            lambda v: dsa_indexer(
                v["index_q"],
                v["index_w"],
                state.caches["index_cache"],
                step.block_table,
                step.positions,
                config.index_topk,
                numerics.indexer_fp8,
                kv,
            ),
        ),
    ]
