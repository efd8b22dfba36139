"""Which checkpoint tensors become which parameter: the recipes behind bindings.json, and loading by them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch

from seekforge.common.errors import ProgramError
from seekforge.exporter.models.deepseek_v32.model import MtpModel, StepModel
from seekforge.formats.checkpoint.model_config import FP8_BLOCK, ModelConfig, RopeScaling
from seekforge.formats.int_quant import quantised_recipes
from seekforge.formats.weight_recipes import (
    Over,
    Ranks,
    Recipe,
    TensorSource,
    cast,
    concat,
    dequantise,
    evaluate,
    expert_map,
    hadamard_table,
    reshape,
    rope_table,
    slice_,
    split,
    stack,
    take,
)
from seekforge.plugins.operator import cdiv
from seekforge.plugins.torch_ops import DTYPE_NAMES

_ONE = Ranks()

#: Why the MTP layer's own embedding and head are not read.
_COPY = "physical copy of {}; checked equal when weights are read, stored once"


def recipes(model: StepModel | MtpModel) -> dict[str, Recipe]:
    """Return parameter name -> recipe for every parameter of `model`, in `named_parameters` order.

    Raises:
        ProgramError: a parameter has no recipe, or one of another shape (a bug of ours, found at export).
    """
    config, dtype, ranks = model.settings.config, model.settings.dtype_name, model.settings.ranks
    table = _tables(config) | {"expert_map": expert_map(config.n_routed_experts, ranks)}
    if isinstance(model, MtpModel):
        table |= _mtp(config, model.layer_numbers[0], dtype)
    else:
        table |= _ends(config, dtype)
    for layer in model.layer_numbers:
        table |= _layer(config, layer, dtype, ranks)
    if model.settings.quantisation is not None:
        table = quantised_recipes(table, model.settings.quantisation)
    result = {}
    for name, parameter in model.named_parameters():
        recipe = table.get(name)
        found = None if recipe is None else (recipe.shape, recipe.dtype)
        expected = (tuple(parameter.shape), DTYPE_NAMES[parameter.dtype])
        if recipe is None or found != expected:
            raise ProgramError(f"weight input {name}: recipe gives {found}, the model needs {expected}")
        result[name] = recipe
    return result


def unused_tensors(config: ModelConfig) -> dict[str, str]:
    """Return the checkpoint tensors that no program reads, with the reason."""
    if config.mtp_layer is None:
        return {}
    prefix = f"model.layers.{config.mtp_layer}."
    return {
        prefix + "embed_tokens.weight": _COPY.format("model.embed_tokens.weight"),
        prefix + "shared_head.head.weight": _COPY.format("lm_head.weight"),
    }


def load_weights(model: StepModel | MtpModel, source: TensorSource) -> None:
    """Fill every parameter of `model` from a checkpoint, one at a time.

    Parameters that are plain checkpoint tensors share the mapped memory of `source`, which must stay open.
    """
    state = {name: to_torch(evaluate(recipe, source)) for name, recipe in recipes(model).items()}
    model.load_state_dict(state, strict=True, assign=True)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Return a NumPy array (ml_dtypes included) as a tensor that shares its memory; unaligned ones are copied."""
    carriers = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    array = np.require(array, requirements=["C", "ALIGNED"])
    carrier, dtype = carriers.get(array.dtype.name, (array.dtype, None))
    with warnings.catch_warnings():  # the map is read-only and torch says so; nothing writes to a weight
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array.view(carrier))
    return tensor if dtype is None else tensor.view(dtype)


def _tables(config: ModelConfig) -> dict[str, Recipe]:
    scaling = config.rope_scaling
    rope = {
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "magnitude": _magnitude(scaling),
    }
    size = {"num_positions": config.max_position_embeddings, "dim": config.qk_rope_head_dim}
    return {
        "rope_cos": rope_table("rope_cos", rope=rope, **size),
        "rope_sin": rope_table("rope_sin", rope=rope, **size),
        "hadamard": hadamard_table(config.index_head_dim),
    }


def _magnitude(scaling: RopeScaling) -> float:
    """Factor on cos and sin: 1 when mscale equals mscale_all_dim, as in V3.2 (spec §1.2)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)


def _bf16(name: str, shape: tuple[int, ...], dtype: str) -> Recipe:
    """A tensor stored in bf16, as the activation dtype."""
    return cast(take(name, shape, "bf16"), dtype)


def _fp8(name: str, n: int, k: int, *, ranks: Ranks = _ONE, over: Over = "all", axis: int = 0) -> tuple[Recipe, Recipe]:
    """An FP8 matrix and its block scales; a rank's part of them along `axis`."""
    weight = take(f"{name}.weight", (n, k), "f8e4m3")
    scale = take(f"{name}.weight_scale_inv", (cdiv(n, FP8_BLOCK), cdiv(k, FP8_BLOCK)), "f32")
    return split(weight, axis, over, ranks), split(scale, axis, over, ranks)


def _linear(target: str, *sources: tuple[str, int], k: int, ranks: Ranks = _ONE, axis: int = 0) -> dict[str, Recipe]:
    """Recipes of one `Fp8Linear` from one or more checkpoint matrices stacked by rows.

    Every matrix but the last must have a multiple of 128 rows, so that each starts on a block. With several `ranks`,
    each has an equal part of every matrix, by rows (axis 0) or by columns (axis 1), in whole blocks.
    """
    assert all(n % FP8_BLOCK == 0 for _, n in sources[:-1]), sources
    pairs = [_fp8(name, n, k, ranks=ranks, over="all", axis=axis) for name, n in sources]
    weights, scales = zip(*pairs, strict=True)
    single = len(sources) == 1
    return {
        f"{target}.weight": weights[0] if single else concat(weights),
        f"{target}.weight_scale": scales[0] if single else concat(scales),
    }


def _ends(config: ModelConfig, dtype: str) -> dict[str, Recipe]:
    vocabulary = (config.vocab_size, config.hidden_size)
    return {
        "embed_tokens.weight": _bf16("model.embed_tokens.weight", vocabulary, dtype),
        "norm.weight": _bf16("model.norm.weight", (config.hidden_size,), dtype),
        "lm_head.weight": _bf16("lm_head.weight", vocabulary, dtype),
    }


def _mtp(config: ModelConfig, layer: int, dtype: str) -> dict[str, Recipe]:
    prefix, hidden = f"model.layers.{layer}.", config.hidden_size
    return _ends(config, dtype) | {
        "enorm.weight": _bf16(prefix + "enorm.weight", (hidden,), dtype),
        "hnorm.weight": _bf16(prefix + "hnorm.weight", (hidden,), dtype),
        "eh_proj": _bf16(prefix + "eh_proj.weight", (hidden, 2 * hidden), dtype),
        "norm.weight": _bf16(prefix + "shared_head.norm.weight", (hidden,), dtype),
    }


def _layer(config: ModelConfig, layer: int, dtype: str, ranks: Ranks) -> dict[str, Recipe]:
    source, target, hidden = f"model.layers.{layer}.", f"layers.{layer}.", config.hidden_size
    result = {
        target + name: _bf16(source + name, (hidden,), dtype)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
    }
    attention = _attention(config, source, target, dtype, ranks)
    return result | attention | _mlp(config, layer, source, target, dtype, ranks)


def _attention(config: ModelConfig, source: str, target: str, dtype: str, ranks: Ranks) -> dict[str, Recipe]:
    source, target = source + "self_attn.", target + "self_attn."
    hidden, heads, index_dim = config.hidden_size, config.num_attention_heads, config.index_head_dim
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    kv_b = dequantise(*_fp8(source + "kv_b_proj", heads * (nope + value), latent), dtype)
    per_head = reshape(kv_b, (heads, nope + value, latent))
    return {
        **_linear(
            target + "qkv_a_proj",
            (source + "q_a_proj", config.q_lora_rank),
            (source + "indexer.wk", index_dim),
            (source + "kv_a_proj_with_mqa", config.latent_dim),
            k=hidden,
        ),
        target + "q_a_layernorm.weight": _bf16(source + "q_a_layernorm.weight", (config.q_lora_rank,), dtype),
        target + "kv_a_layernorm.weight": _bf16(source + "kv_a_layernorm.weight", (latent,), dtype),
        **_linear(
            target + "q_b_proj", (source + "q_b_proj", heads * config.qk_head_dim), k=config.q_lora_rank, ranks=ranks
        ),
        target + "w_uk": split(slice_(per_head, 1, 0, nope), 0, "all", ranks),
        target + "w_uv": split(slice_(per_head, 1, nope, nope + value), 0, "all", ranks),
        **_linear(target + "o_proj", (source + "o_proj", hidden), k=heads * value, ranks=ranks, axis=1),
        **_linear(
            target + "indexer.wq_b",
            (source + "indexer.wq_b", config.index_n_heads * index_dim),
            k=config.q_lora_rank,
        ),
        target + "indexer.k_norm.weight": take(source + "indexer.k_norm.weight", (index_dim,), "f32"),
        target + "indexer.k_norm.bias": take(source + "indexer.k_norm.bias", (index_dim,), "f32"),
        target + "indexer.weights_proj.weight": _bf16(
            source + "indexer.weights_proj.weight", (config.index_n_heads, hidden), dtype
        ),
    }


def _mlp(config: ModelConfig, layer: int, source: str, target: str, dtype: str, ranks: Ranks) -> dict[str, Recipe]:
    source, target, hidden = source + "mlp.", target + "mlp.", config.hidden_size

    def swiglu(source: str, target: str, inter: int) -> dict[str, Recipe]:
        gate_up = ((source + "gate_proj", inter), (source + "up_proj", inter))
        return _linear(target + "gate_up_proj", *gate_up, k=hidden, ranks=ranks) | _linear(
            target + "down_proj", (source + "down_proj", hidden), k=inter, ranks=ranks, axis=1
        )

    if not config.is_moe_layer(layer):
        return swiglu(source, target, config.intermediate_size)
    inter, experts = config.moe_intermediate_size, config.n_routed_experts

    def each(name: str, n: int, k: int, axis: int) -> list[tuple[Recipe, Recipe]]:
        names = (f"{source}experts.{e}.{name}" for e in range(experts))
        return [_fp8(expert, n, k, ranks=ranks, over="tp", axis=axis) for expert in names]

    def deal(parts: Iterable[Recipe]) -> Recipe:
        return split(stack(parts), 0, "ep", ranks)

    gates, ups = (each(name, inter, hidden, 0) for name in ("gate_proj", "up_proj"))
    downs = each("down_proj", hidden, inter, 1)
    pairs = list(zip(gates, ups, strict=True))
    return {
        target + "gate.weight": _bf16(source + "gate.weight", (experts, hidden), dtype),
        target + "gate.e_score_correction_bias": take(source + "gate.e_score_correction_bias", (experts,), "f32"),
        target + "experts.w13": deal(concat([gate[0], up[0]]) for gate, up in pairs),
        target + "experts.w13_scale": deal(concat([gate[1], up[1]]) for gate, up in pairs),
        target + "experts.w2": deal(down[0] for down in downs),
        target + "experts.w2_scale": deal(down[1] for down in downs),
        **swiglu(source + "shared_experts.", target + "shared_experts.", config.n_shared_experts * inter),
    }
