"""Weights to begin with: random ones, and a pair of heads that copy what followed an equal token (an induction head).

A model of this size finds that pair by itself only after a plateau that is longer than its whole training; with it
recall and copying are there to be refined from the beginning. The pair, and what hangs on it: "In-context Learning
and Induction Heads" (Olsson et al., 2022). That weights may begin like trained ones: "Mimetic Initialization of
Self-Attention Layers" (Trockman, Kolter, 2023).

In the first layer a constant part of the embeddings makes a head out of RoPE that looks one token back; it writes what
it sees into values of the residual stream that embeddings leave free. In the second layer a head compares its own token
with what stands there, so does the first head of its indexer; and it writes what it then sees back as it was embedded.
The output begins as a small multiple of the embedding, so that this is the token that is said.
"""

from __future__ import annotations

from typing import cast

import torch

from seekforge.exporter.training.model import Attention, Layer, TrainedModel
from seekforge.formats.checkpoint.model_config import ModelConfig

#: The constant part of embeddings, in their first value.
_CONSTANT = 4.0
#: Pairs of RoPE that look back, the fastest ones, and how sharply.
_PAIRS, _SHARPNESS = 12, 0.9
#: What is written of the token before, and how sharply it is compared.
_WRITTEN, _MATCH = 1.0, 1.4
#: Weight of the indexer's head that compares in the same way, for each unit of the constant part.
_INDEX_WEIGHT = 0.5
#: How strongly the token that was found is written, and what embeddings are multiplied by in the output.
_COPIED, _SAID = 2.0, 0.04
#: What is left of the random part of the rotary queries and keys.
_NOISE = 0.3
#: The first layers, in which the two heads are planted.
PLANTED_LAYERS = 2


def initialize(model: TrainedModel) -> None:
    """Plant the pair into a model with random weights."""
    with torch.no_grad():
        first, second = (cast(Layer, model.layers[number]).self_attn for number in range(PLANTED_LAYERS))
        free = model.config.v_head_dim
        model.embed_tokens[:, -free:] = 0
        model.embed_tokens[:, 0] = _CONSTANT
        model.lm_head.copy_(model.embed_tokens * _SAID)
        model.lm_head[:, 0] = 0
        _compare(second, _look_back(first, model))
        _copy(second)


def _directions(config: ModelConfig) -> torch.Tensor:
    """Return [v_head_dim, H], orthonormal directions of what embeddings have at random.

    Products of random matrices would keep fewer of them apart, and which tokens are taken for one another would hang on
    the seed.
    """
    used = config.hidden_size - config.v_head_dim
    drawn = torch.randn(used - 1, config.v_head_dim)
    directions = torch.zeros(config.v_head_dim, config.hidden_size)
    directions[:, 1:used] = torch.linalg.qr(drawn).Q.T
    return directions


def _look_back(attention: Attention, model: TrainedModel) -> torch.Tensor:
    """Make the first head look one token back; return [v_head_dim, H], what it reads there."""
    config = attention.config
    heads, nope, free = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    frequencies = torch.atan2(model.rope_sin[1], model.rope_cos[1])[:_PAIRS]
    latent, keys = attention.kv_a_proj_with_mqa.split([config.kv_lora_rank, config.qk_rope_head_dim])
    keys.mul_(_NOISE)
    keys[0 : 2 * _PAIRS : 2, 0] = _SHARPNESS
    attention.q_a_proj[0] = 0
    attention.q_a_proj[0, 0] = 1
    read = _directions(config)
    latent[:, 0] = 0
    latent[:free] = read
    query = attention.q_b_proj.view(heads, config.qk_head_dim, -1)[0]
    query.mul_(_NOISE)
    query[nope : nope + 2 * _PAIRS : 2, 0] = _SHARPNESS * torch.cos(frequencies)
    query[nope + 1 : nope + 2 * _PAIRS : 2, 0] = -_SHARPNESS * torch.sin(frequencies)
    attention.o_proj[:, :free] = 0
    attention.o_proj[-free:] = 0
    attention.o_proj[-free:, :free] = torch.eye(free) * _WRITTEN
    values = attention.kv_b_proj.view(heads, nope + free, -1)[0, nope:]
    values.zero_()
    values[:, :free] = torch.eye(free)
    return read


def _compare(attention: Attention, read: torch.Tensor) -> None:
    """Make the first head compare its token, read alike, with what was written of the tokens before all others."""
    config = attention.config
    heads, nope, free = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    attention.q_a_proj[:free] = read
    attention.kv_a_proj_with_mqa[:free] = 0
    attention.kv_a_proj_with_mqa[:free, -free:] = torch.eye(free)
    query = attention.q_b_proj.view(heads, config.qk_head_dim, -1)[0]
    query.mul_(_NOISE)
    query[:nope] = 0
    query[:nope, :nope] = torch.eye(nope) * _MATCH
    key = attention.kv_b_proj.view(heads, nope + free, -1)[0, :nope]
    key.zero_()
    key[:, :nope] = torch.eye(nope) * _MATCH
    indexer = attention.indexer
    rotated = config.qk_rope_head_dim
    indexer.wk[rotated:] = 0
    indexer.wk[rotated:, -free:] = torch.eye(free)
    first = indexer.wq_b.view(config.index_n_heads, config.index_head_dim, -1)[0]
    first.zero_()
    first[rotated:, :free] = torch.eye(free) * _MATCH
    indexer.weights_proj[0, 0] = _INDEX_WEIGHT


def _copy(attention: Attention) -> None:
    """Make the first head write what it attends to as it was embedded, as far as v_head_dim values hold that."""
    config = attention.config
    heads, nope, free = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    read = _directions(config)
    attention.kv_a_proj_with_mqa[free : 2 * free] = read
    values = attention.kv_b_proj.view(heads, nope + free, -1)[0, nope:]
    values.zero_()
    values[:, free : 2 * free] = torch.eye(free)
    attention.o_proj[:, :free] = _COPIED * read.T
