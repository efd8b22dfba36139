"""What the families' tables of parameters share: all but the attention's further tensors (spec §2.2, §2.3).

`models.parameters` says what a row is and what is derived from one.
"""

from __future__ import annotations

import functools
from typing import Final, Literal

from seekforge.exporter.models.parameters import EXPERT, Draw, Parameter, Tensor
from seekforge.formats.checkpoint.model_config import LayerKind, ModelConfig
from seekforge.plugins.registry import ADD_RMS_NORM_QUANTIZE, BF16_LINEAR, BLOCK_FP8_LINEAR

#: Kind of weight (`int_quant.kind_of`) -> the smallest codes that an int4 engine stores it in, f32 for those that stay.
#: Those that are int8 are a small part of the weights. Measured on DeepSeek-V3.2's `tiny`: with all in int4, the
#: indexer's queries included, its KL is 0.14; each alone, qkv_a_proj and lm_head cost 0.07 and 0.03. Choices hang on
#: the router, which is small; W_UK and W_UV are products per head, for which ONNX Runtime has no quantized form;
#: embeddings are looked up.
CODES: Final[dict[str, str]] = {
    "qkv_a_proj": "int8",
    "q_b_proj": "int4",
    "o_proj": "int4",
    "gate_up_proj": "int4",
    "down_proj": "int4",
    "experts": "int4",
    "lm_head": "int8",
    "gate": "f32",
    "w_uk": "f32",
    "w_uv": "f32",
    "eh_proj": "f32",
    "embed_tokens": "f32",
}

#: What else nodes are named after, in words.
PLACES: Final[dict[str, str]] = {
    "head": "the results behind the last layer",
    "rope_cos": "the rotary tables",
    "rope_sin": "the rotary tables",
    "step": "what all layers share (shapes and positions)",
}


#: Modules of a layer, and the one behind all layers, that tools and messages speak of.
ATTENTION: Final = "self_attn"
ROUTER: Final = "mlp.gate"
HEAD: Final = "lm_head"
#: The experts of a layer as transformers holds them, stacked: its parameter, below the layer -> the tensors of an
#: expert in a checkpoint, which share its rows.
STACKED_EXPERTS: Final[dict[str, tuple[str, ...]]] = {
    "mlp.experts.gate_up_proj": (f"mlp.experts.{EXPERT}.gate_proj.weight", f"mlp.experts.{EXPERT}.up_proj.weight"),
    "mlp.experts.down_proj": (f"mlp.experts.{EXPERT}.down_proj.weight",),
}


# --- checkpoint -----------------------------------------------------------------------------------------------


def mla_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Return the tensors of multi-head latent attention."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries, keys = config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim
    return (
        Tensor("self_attn.q_a_proj.weight", (config.q_lora_rank, hidden)),
        _norm("self_attn.q_a_layernorm.weight", config.q_lora_rank),
        _by_heads("self_attn.q_b_proj.weight", (heads * queries, config.q_lora_rank), heads, axis=0),
        Tensor("self_attn.kv_a_proj_with_mqa.weight", (config.latent_dim, hidden)),
        _norm("self_attn.kv_a_layernorm.weight", latent),
        # dequantized for the absorbed form: the same number of products, by head, in BF16
        _by_heads("self_attn.kv_b_proj.weight", (heads * keys, latent), heads, axis=0, held="bf16"),
        _by_heads("self_attn.o_proj.weight", (hidden, heads * config.v_head_dim), heads, axis=1, draw="branch"),
    )


def _by_heads(
    name: str,
    shape: tuple[int, int],
    heads: int,
    *,
    axis: int,
    held: Literal["bf16"] | None = None,
    draw: Draw = "blocks",
) -> Tensor:
    """Return a matrix of which each tensor-parallel rank has some heads."""
    key = "num_attention_heads"
    return Tensor(name, shape, sharding="tensor", axis=axis, units=heads, units_key=key, held=held, draw=draw)


def layer_tensors(
    config: ModelConfig,
    layer: int,
    *,
    attention: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Return the tensors of a layer in a checkpoint's order, the MTP layer's further ones included.

    Args:
        config: the model.
        layer: its absolute number.
        attention: the tensors of its attention.
    """
    hidden = config.hidden_size
    mlp = (
        moe_tensors(config)
        if config.is_moe_layer(layer)
        else mlp_tensors("mlp", hidden, config.intermediate_size, "intermediate_size")
    )
    return (
        _norm("input_layernorm.weight", hidden),
        *attention,
        _norm("post_attention_layernorm.weight", hidden),
        *mlp,
        *(mtp_tensors(config) if layer == config.mtp_layer else ()),
    )


def moe_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Return the tensors of a mixture of experts: the router, the shared expert, the routed ones."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    key = "moe_intermediate_size"
    return (
        Tensor("mlp.gate.weight", (experts, hidden), "bf16", draw="router"),
        Tensor("mlp.gate.e_score_correction_bias", (experts,), "f32", active=0, draw="bias"),
        *mlp_tensors("mlp.shared_experts", hidden, inner * config.n_shared_experts, f"n_shared_experts * {key}"),
        *mlp_tensors(f"mlp.experts.{EXPERT}", hidden, inner, key, experts, config.num_experts_per_tok),
    )


def mlp_tensors(prefix: str, hidden: int, inner: int, key: str, count: int = 1, active: int = 1) -> tuple[Tensor, ...]:
    """Return the three matrices of an MLP whose width is `key` of config.json, or of `count` experts."""
    sharding = "experts" if EXPERT in prefix else "tensor"
    matrices: tuple[tuple[str, tuple[int, int], int, Draw], ...] = (
        ("gate_proj", (inner, hidden), 0, "blocks"),
        ("up_proj", (inner, hidden), 0, "blocks"),
        ("down_proj", (hidden, inner), 1, "branch"),
    )
    return tuple(
        Tensor(
            f"{prefix}.{name}.weight",
            shape,
            sharding=sharding,
            axis=axis,
            units=inner,
            units_key=key,
            count=count,
            active=active,
            draw=draw,
        )
        for name, shape, axis, draw in matrices
    )


def mtp_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Return what the MTP layer has beside a layer; its embedding and head repeat those of the main model."""
    hidden, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    return (
        _norm("enorm.weight", hidden),
        _norm("hnorm.weight", hidden),
        Tensor("eh_proj.weight", (hidden, 2 * hidden), "bf16", draw="plain"),
        _norm("shared_head.norm.weight", hidden),
        Tensor("shared_head.head.weight", table, "bf16", draw="head", copy_of="lm_head.weight"),
        Tensor("embed_tokens.weight", table, "bf16", draw="embedding", copy_of="model.embed_tokens.weight"),
    )


def end_tensors(config: ModelConfig) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the tensors before the first layer and those behind the last one."""
    table = functools.partial(
        Tensor,
        shape=(config.vocab_size, config.hidden_size),
        dtype="bf16",
        sharding="vocabulary",
        axis=0,
        units=config.vocab_size,
        units_key="vocab_size",
    )
    embedding = table("model.embed_tokens.weight", active=0, draw="embedding")
    head = table("lm_head.weight", draw="head", is_head=True)
    return (embedding,), (_norm("model.norm.weight", config.hidden_size), head)


def _norm(name: str, size: int) -> Tensor:
    """Return the weights of a norm: BF16 in the checkpoint and read as f32 in every step, so engines hold them so."""
    return Tensor(name, (size,), "bf16", active=0, held="f32", draw="norm")


# --- program --------------------------------------------------------------------------------------------------

#: The norms of a layer whose results FP8 linears multiply.
_INPUT, _POST_ATTENTION = "input_layernorm.weight", "post_attention_layernorm.weight"
QUERY_NORM: Final = "self_attn.q_a_layernorm.weight"


def mla_parameters(*fused: str) -> tuple[Parameter, ...]:
    """Return the parameters of multi-head latent attention; `fused`: modules that are one product of the input."""
    kv_b = ("self_attn.kv_b_proj",)
    return (
        linear("self_attn.qkv_a_proj", fused, "the joint projection to query and key latents", norm=_INPUT),
        value(QUERY_NORM, "the norm of the query latent", op=ADD_RMS_NORM_QUANTIZE),
        linear(
            "self_attn.q_b_proj",
            ("self_attn.q_b_proj",),
            "the projection from the query latent to heads",
            norm=QUERY_NORM,
        ),
        value("self_attn.kv_a_layernorm.weight", "the norm of the key latent"),
        Parameter("self_attn.w_uk", "per_head", kv_b, "the attention", rows="keys"),
        Parameter("self_attn.w_uv", "per_head", kv_b, "the attention", rows="values"),
        linear("self_attn.o_proj", ("self_attn.o_proj",), "the output projection of the attention"),
    )


def layer_parameters(kind: LayerKind, *, attention: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Return the parameters of a layer; `attention`: those of its attention."""
    return (
        value(_INPUT, "the norm before the attention", op=ADD_RMS_NORM_QUANTIZE, adds=True),
        *attention,
        value(_POST_ATTENTION, "the norm before the MLP", op=ADD_RMS_NORM_QUANTIZE, adds=True),
        *(_moe_parameters() if kind.is_moe else _mlp_parameters("mlp", "the dense MLP's")),
    )


def _mlp_parameters(prefix: str, whose: str, *, shared: bool = False) -> tuple[Parameter, ...]:
    gate_up, down = (f"{prefix}.gate_proj", f"{prefix}.up_proj"), (f"{prefix}.down_proj",)
    does = f"{whose} gate and up projection"
    return (
        linear(f"{prefix}.gate_up_proj", gate_up, does, norm=_POST_ATTENTION, shared=shared),
        linear(f"{prefix}.down_proj", down, f"{whose} down projection", shared=shared),
    )


def _moe_parameters() -> tuple[Parameter, ...]:
    gate, up, down = (f"mlp.experts.{EXPERT}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    return (
        value("mlp.gate.weight", "the router", op=BF16_LINEAR),
        value("mlp.gate.e_score_correction_bias", "the router"),
        Parameter("mlp.experts.w13", "experts", (gate, up), "the routed experts", norm=_POST_ATTENTION),
        Parameter("mlp.experts.w2", "experts", (down,), "the routed experts"),
        *_mlp_parameters("mlp.shared_experts", "the shared expert's", shared=True),
    )


def end_parameters() -> tuple[Parameter, ...]:
    """Return the parameters outside layers, whose tensors have their whole names."""
    return (
        value("embed_tokens.weight", "the embedding", "model.embed_tokens.weight"),
        value("norm.weight", "the final norm", "model.norm.weight", is_behind=True),
        value("lm_head.weight", "the head", op=BF16_LINEAR, is_behind=True),
    )


def mtp_parameters() -> tuple[Parameter, ...]:
    """Return what the MTP module has outside its layer, made of tensors of it; embedding and head are shared."""
    return (
        value("enorm.weight", "the norm of the embedding"),
        value("hnorm.weight", "the norm of the hidden state"),
        value("eh_proj", "the projection of embedding and hidden state", "eh_proj.weight"),
        value("norm.weight", "the final norm", "shared_head.norm.weight", is_behind=True),
    )


def linear(
    name: str, tensors: tuple[str, ...], does: str, *, norm: str = "", beside: str = "", shared: bool = False
) -> Parameter:
    """Return an FP8 linear; `norm`: whose result it multiplies; `beside`: a linear that multiplies the same value."""
    return Parameter(name, "linear", tensors, does, BLOCK_FP8_LINEAR, beside=beside, norm=norm, shared=shared)


def value(
    name: str, does: str, tensor: str = "", *, op: str = "", is_behind: bool = False, adds: bool = False
) -> Parameter:
    """Return a parameter that is a tensor as it is, of the same name if none is given."""
    return Parameter(name, "value", (tensor or name,), does, op, is_behind=is_behind, adds=adds)
