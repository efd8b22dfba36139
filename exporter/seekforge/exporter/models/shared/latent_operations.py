"""The operations of multi-head latent attention that all families have (see `layer_operations`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from seekforge.exporter.models.shared.layer_operations import LayerModule, LayerState, Op, Part, Values
from seekforge.exporter.models.shared.layers import rope_interleaved


def before_cache(owner: LayerModule, state: LayerState, between: tuple[tuple[str, str], ...] = ()) -> list[Op]:
    """Return the operations up to the cache write.

    Args:
        owner: the layer.
        state: what is cached for it.
        between: (module below `self_attn`, what it gives) of each further product of `qkv_a_proj`
            (`LatentAttention.splits`).
    """
    attention, step = owner.module.self_attn, state.step
    config, splits = owner.config, attention.splits
    starts = [sum(splits[:i]) for i in range(len(splits) + 1)]

    def columns(part: int) -> Callable[[Values], Tensor]:
        return lambda v: v["qkv_a"][..., starts[part] : starts[part + 1]]

    latent = 1 + len(between)  # the last two are the latent and the rotary key, of one module
    raw_q, raw_c, raw_pe = columns(0), columns(latent), columns(latent + 1)
    others = [(name, i, i + 1) for i, (name, _) in enumerate(between, 1)]
    fused = [("q_a_proj", 0, 1), *others, ("kv_a_proj_with_mqa", latent, latent + 2)]
    results = ["q_a", *(result for _, result in between)]

    def normed(v: Values) -> Tensor:
        if "residual" not in v:
            return owner.module.input_layernorm(v["hidden_states"])
        return owner.module.input_layernorm.add(v["hidden_states"], v["residual"])[0]

    def q_heads(v: Values) -> Tensor:
        return v["q_b"].unflatten(-1, (config.num_attention_heads, config.qk_head_dim))

    def q_latent(v: Values) -> Tensor:
        q_nope = q_heads(v)[..., : config.qk_nope_head_dim]
        return attention.latent_queries(q_nope.flatten(0, 1), q_nope.shape[:2])

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
            f"{', '.join(results)} and kv_a as one product",
            "attn_norm",
            "qkv_a",
            attention.qkv_a_proj,
            tuple(
                Part(starts[a], starts[b], f"self_attn.{name}", owner.stored(f"self_attn.{name}"))
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


def output(owner: LayerModule) -> list[Op]:
    """Return the operations behind the softmax."""
    attention, names = owner.module.self_attn, owner.tensors

    def o(v: Values) -> Tensor:
        o_latent = v["o_latent"]
        return attention.values(o_latent).reshape(*o_latent.shape[:2], -1)

    return [
        Op("self_attn.kv_b_proj (values)", "values of all heads", ("o_latent",), "o", o, names("self_attn.w_uv")),
        owner.apply("self_attn.o_proj", "output projection", "o", "attn_out", attention.o_proj),
    ]
