"""The operations of a layer's attention, from its input to the output projection (see `models.layer_operations`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from seekforge.exporter.models.deepseek_v32.layers import product_per_head, rope_interleaved
from seekforge.exporter.models.layer_operations import LayerModule, LayerState, Op, Part, Values
from seekforge.plugins.dsa_attention.reference import dsa_attention
from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.dsa_indexer.reference import dsa_indexer, index_scores


def before_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations up to the cache write."""
    attention, step = owner.module.self_attn, state.step
    start = attention.splits[0]
    stop = start + attention.splits[1]
    return [
        *mla_before_cache(owner, state),
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
            "half-split RoPE and Hadamard of the index key",
            ("index_k_norm",),
            "index_k",
            lambda v: attention.indexer.rotate(v["index_k_norm"], step),
        ),
    ]


def mla_before_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations of multi-head latent attention up to the cache write."""
    attention, step = owner.module.self_attn, state.step
    config, splits = owner.config, attention.splits
    prefix = f"model.layers.{owner.layer}.self_attn."
    starts = [sum(splits[:i]) for i in range(len(splits) + 1)]

    def columns(part: int) -> Callable[[Values], Tensor]:
        return lambda v: v["qkv_a"][..., starts[part] : starts[part + 1]]

    latent = len(splits) - 2  # the last two are the latent and the rotary key, of one module
    raw_q, raw_c, raw_pe = columns(0), columns(latent), columns(latent + 1)
    between = [("indexer.wk", 1, 2)] if latent == 2 else []
    fused = [("q_a_proj", 0, 1), *between, ("kv_a_proj_with_mqa", latent, latent + 2)]

    def normed(v: Values) -> Tensor:
        if "residual" not in v:
            return owner.module.input_layernorm(v["hidden_states"])
        return owner.module.input_layernorm.add(v["hidden_states"], v["residual"])[0]

    def q_heads(v: Values) -> Tensor:
        return v["q_b"].unflatten(-1, (config.num_attention_heads, config.qk_head_dim))

    def q_latent(v: Values) -> Tensor:
        q_nope = q_heads(v)[..., : config.qk_nope_head_dim]
        return product_per_head(q_nope.flatten(0, 1), attention.w_uk).unflatten(0, q_nope.shape[:2])

    def q_pe(v: Values) -> Tensor:
        x = q_heads(v)[..., config.qk_nope_head_dim :]
        heads = config.num_attention_heads
        return rope_interleaved(x.flatten(2), step.cos, step.sin, heads).unflatten(-1, (heads, -1))

    names = owner.tensors
    return [
        Op(
            "input_layernorm",
            "norm before attention",
            ("hidden_states", "residual"),
            "attn_norm",
            normed,
            names("input_layernorm"),
        ),
        owner.apply(
            "self_attn.qkv_a_proj",
            f"{'q_a, index key and kv_a' if between else 'q_a and kv_a'} as one product",
            "attn_norm",
            "qkv_a",
            attention.qkv_a_proj,
            tuple(
                Part(
                    starts[a],
                    starts[b],
                    f"self_attn.{name}",
                    (f"{prefix}{name}.weight", f"{prefix}{name}.weight_scale_inv"),
                )
                for name, a, b in fused
            ),
        ),
        Op(
            "self_attn.q_a_layernorm",
            "norm of the query latent",
            ("qkv_a",),
            "q_a_norm",
            lambda v: attention.q_a_layernorm(raw_q(v)),
            names("self_attn.q_a_layernorm"),
        ),
        owner.apply("self_attn.q_b_proj", "queries of all heads", "q_a_norm", "q_b", attention.q_b_proj),
        Op("self_attn.rotary (queries)", "RoPE of the queries, interleaved pairs", ("q_b",), "q_pe", q_pe),
        Op(
            "self_attn.kv_b_proj (keys)",
            "queries in the latent space",
            ("q_b",),
            "q_latent",
            q_latent,
            names("self_attn.w_uk"),
        ),
        Op(
            "self_attn.kv_a_layernorm",
            "norm of the cached latent",
            ("qkv_a",),
            "kv_latent",
            lambda v: attention.kv_a_layernorm(raw_c(v)),
            names("self_attn.kv_a_layernorm"),
        ),
        Op(
            "self_attn.rotary (keys)",
            "RoPE of the shared key, interleaved pairs",
            ("qkv_a",),
            "k_pe",
            lambda v: rope_interleaved(raw_pe(v), step.cos, step.sin),
        ),
    ]


#: Points that `write_cache` reads.
CACHED = ("kv_latent", "k_pe", "index_k")


def write_cache(owner: LayerModule, state: LayerState, values: Values) -> None:
    """Put this step's rows into the caches of `state`."""
    numerics, kv = owner.settings.numerics, owner.settings.dtype_name
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
        owner.settings.dtype_name,
    )


def behind_cache(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations behind the cache write: indexer and attention."""
    attention = owner.module.self_attn
    config, numerics, step = owner.config, owner.settings.numerics, state.step
    kv = owner.settings.dtype_name

    def index_q(v: Values) -> Tensor:
        return attention.indexer.rotate(v["wq_b"], step, config.index_n_heads)

    return [
        owner.apply("self_attn.indexer.wq_b", "index queries", "q_a_norm", "wq_b", attention.indexer.wq_b),
        Op(
            "self_attn.indexer (rotation of queries)",
            "half-split RoPE and Hadamard of the index queries",
            ("wq_b",),
            "index_q",
            index_q,
        ),
        owner.apply(
            "self_attn.indexer.weights_proj",
            "weights of the index heads",
            "attn_norm",
            "index_w",
            attention.indexer.head_weights,
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
        *mla_output(owner),
    ]


def mla_output(owner: LayerModule) -> list[Op]:
    """Return the operations behind the softmax."""
    attention, names = owner.module.self_attn, owner.tensors

    def o(v: Values) -> Tensor:
        o_latent = v["o_latent"]
        per_head = product_per_head(o_latent.flatten(0, 1), attention.w_uv.transpose(1, 2))
        return per_head.reshape(*o_latent.shape[:2], -1)

    return [
        Op("self_attn.kv_b_proj (values)", "values of all heads", ("o_latent",), "o", o, names("self_attn.w_uv")),
        owner.apply("self_attn.o_proj", "output projection", "o", "attn_out", attention.o_proj),
    ]
