"""Which tensors a DeepSeek-V3.2 checkpoint of a given config has: name, dtype, shape (spec §2.2, §2.3)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from seekforge.common.dtypes import itemsize
from seekforge.formats.checkpoint.model_config import FP8_BLOCK, ModelConfig

SCALE_SUFFIX = "_scale_inv"
#: A buffer that transformers once saved: what RoPE computes from the config.
_ROTARY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class ExpectedTensor:
    """What the config says of one tensor.

    Attributes:
        dtype: our name of the element type (f8e4m3, bf16 or f32).
        shape: sizes, outermost first.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.num_elements * itemsize(self.dtype)


@dataclass(frozen=True)
class Totals:
    """Sizes of a checkpoint (spec §2.4).

    Attributes:
        num_tensors: tensors, scales included.
        num_parameters: elements, scales not included.
        num_bytes: bytes of tensor data, scales included, headers not.
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int


def expected_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """Return every tensor of a checkpoint of `config`, in layer order; a weight's scale follows it.

    Returns:
        Tensor name -> dtype and shape: `embed_tokens`, layers 0 … num_hidden_layers - 1, the final norm and
        `lm_head`, and the MTP layer with its copies of embedding and head when the config has one.
    """
    return dict(_all(config))


def optional_tensors(config: ModelConfig) -> dict[str, str]:
    """Return the tensors of `expected_tensors` that may be absent -> those of the main model that they repeat."""
    if config.mtp_layer is None:
        return {}
    prefix = f"model.layers.{config.mtp_layer}."
    return {
        prefix + "embed_tokens.weight": "model.embed_tokens.weight",
        prefix + "shared_head.head.weight": "lm_head.weight",
    }


def needless_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return those of `names` that hold nothing of a model, with the reason."""
    return {name: "left over: RoPE is computed from config.json" for name in names if _ROTARY.fullmatch(name)}


def totals(tensors: dict[str, ExpectedTensor]) -> Totals:
    """Add up `tensors`."""
    return Totals(
        num_tensors=len(tensors),
        num_parameters=sum(t.num_elements for name, t in tensors.items() if not name.endswith(SCALE_SUFFIX)),
        num_bytes=sum(t.num_bytes for t in tensors.values()),
    )


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the block scales of an FP8 weight [N, K]: [⌈N/128⌉, ⌈K/128⌉]."""
    n, k = shape
    return -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)


def _all(config: ModelConfig) -> Iterator[tuple[str, ExpectedTensor]]:
    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", ExpectedTensor("bf16", table)
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer)
    yield "model.norm.weight", ExpectedTensor("bf16", (config.hidden_size,))
    yield "lm_head.weight", ExpectedTensor("bf16", table)
    if config.mtp_layer is not None:
        yield from _layer(config, config.mtp_layer)
        yield from _mtp(config, config.mtp_layer)


def _layer(config: ModelConfig, layer: int) -> Iterator[tuple[str, ExpectedTensor]]:
    prefix = f"model.layers.{layer}."
    hidden = config.hidden_size
    yield prefix + "input_layernorm.weight", ExpectedTensor("bf16", (hidden,))
    yield from _attention(config, prefix + "self_attn.")
    yield prefix + "post_attention_layernorm.weight", ExpectedTensor("bf16", (hidden,))
    if config.is_moe_layer(layer):
        yield from _moe(config, prefix + "mlp.")
    else:
        yield from _mlp(prefix + "mlp.", hidden, config.intermediate_size)


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, ExpectedTensor]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_rows = config.qk_nope_head_dim + config.v_head_dim
    yield from _fp8(prefix + "q_a_proj", config.q_lora_rank, hidden)
    yield prefix + "q_a_layernorm.weight", ExpectedTensor("bf16", (config.q_lora_rank,))
    yield from _fp8(prefix + "q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
    yield from _fp8(prefix + "kv_a_proj_with_mqa", config.latent_dim, hidden)
    yield prefix + "kv_a_layernorm.weight", ExpectedTensor("bf16", (config.kv_lora_rank,))
    yield from _fp8(prefix + "kv_b_proj", heads * head_rows, config.kv_lora_rank)
    yield from _fp8(prefix + "o_proj", hidden, heads * config.v_head_dim)
    indexer = prefix + "indexer."
    yield from _fp8(indexer + "wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
    yield from _fp8(indexer + "wk", config.index_head_dim, hidden)
    yield indexer + "k_norm.weight", ExpectedTensor("f32", (config.index_head_dim,))
    yield indexer + "k_norm.bias", ExpectedTensor("f32", (config.index_head_dim,))
    yield indexer + "weights_proj.weight", ExpectedTensor("bf16", (config.index_n_heads, hidden))


def _moe(config: ModelConfig, prefix: str) -> Iterator[tuple[str, ExpectedTensor]]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    yield prefix + "gate.weight", ExpectedTensor("bf16", (config.n_routed_experts, hidden))
    yield prefix + "gate.e_score_correction_bias", ExpectedTensor("f32", (config.n_routed_experts,))
    yield from _mlp(prefix + "shared_experts.", hidden, inner * config.n_shared_experts)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{prefix}experts.{expert}.", hidden, inner)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, ExpectedTensor]]:
    yield from _fp8(prefix + "gate_proj", inner, hidden)
    yield from _fp8(prefix + "up_proj", inner, hidden)
    yield from _fp8(prefix + "down_proj", hidden, inner)


def _mtp(config: ModelConfig, layer: int) -> Iterator[tuple[str, ExpectedTensor]]:
    prefix = f"model.layers.{layer}."
    hidden = config.hidden_size
    table = (config.vocab_size, hidden)
    yield prefix + "enorm.weight", ExpectedTensor("bf16", (hidden,))
    yield prefix + "hnorm.weight", ExpectedTensor("bf16", (hidden,))
    yield prefix + "eh_proj.weight", ExpectedTensor("bf16", (hidden, 2 * hidden))
    yield prefix + "shared_head.norm.weight", ExpectedTensor("bf16", (hidden,))
    yield prefix + "shared_head.head.weight", ExpectedTensor("bf16", table)
    yield prefix + "embed_tokens.weight", ExpectedTensor("bf16", table)


def _fp8(prefix: str, n: int, k: int) -> Iterator[tuple[str, ExpectedTensor]]:
    weight = prefix + ".weight"
    yield weight, ExpectedTensor("f8e4m3", (n, k))
    yield weight + SCALE_SUFFIX, ExpectedTensor("f32", scale_shape((n, k)))
