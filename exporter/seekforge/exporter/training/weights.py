"""Weights between training and a checkpoint: the names of the format, FP8 blocks, and the files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from seekforge.common.dtypes import NUMPY
from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.new import layouts, split_into_shards, write_sidecars
from seekforge.exporter.checkpoint.presets import Preset
from seekforge.exporter.checkpoint.schema import expected_tensors
from seekforge.exporter.checkpoint.tokenizer import write_tokenizer_files
from seekforge.exporter.training.model import Attention, Layer, Mlp, Moe, TrainedModel
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import ShardWriter
from seekforge.formats.quantization.block_fp8 import quantize
from seekforge.formats.value_check import SCALE_SUFFIX
from seekforge.formats.weight_recipes import dequantize_into, evaluate, take
from seekforge.formats.weight_recipes.stored import WORDS, values_recipe

_ATTENTION = (
    "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj",
)  # fmt: skip


def named_tensors(model: TrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a checkpoint, scales aside, as a view of the model's parameters, under its name there."""
    yield "model.embed_tokens.weight", model.embed_tokens
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        yield from _layer(f"model.layers.{number}.", layer)
    yield "model.norm.weight", model.norm
    yield "lm_head.weight", model.lm_head
    if model.mtp is not None:
        prefix = f"model.layers.{model.config.num_hidden_layers}."
        yield from _layer(prefix, model.mtp.layer)
        yield f"{prefix}enorm.weight", model.mtp.enorm
        yield f"{prefix}hnorm.weight", model.mtp.hnorm
        yield f"{prefix}eh_proj.weight", model.mtp.eh_proj
        yield f"{prefix}shared_head.norm.weight", model.mtp.norm
        yield f"{prefix}shared_head.head.weight", model.lm_head
        yield f"{prefix}embed_tokens.weight", model.embed_tokens


def _layer(prefix: str, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}input_layernorm.weight", layer.input_layernorm
    yield from _attention(f"{prefix}self_attn.", layer.self_attn)
    yield f"{prefix}post_attention_layernorm.weight", layer.post_attention_layernorm
    mlp = layer.mlp
    if isinstance(mlp, Mlp):
        yield from _mlp(f"{prefix}mlp.", mlp.gate_up_proj, mlp.down_proj)
        return
    assert isinstance(mlp, Moe)
    yield f"{prefix}mlp.gate.weight", mlp.gate
    yield f"{prefix}mlp.gate.e_score_correction_bias", mlp.e_score_correction_bias
    yield from _mlp(f"{prefix}mlp.shared_experts.", mlp.shared_experts.gate_up_proj, mlp.shared_experts.down_proj)
    for expert in range(mlp.w13.shape[0]):
        yield from _mlp(f"{prefix}mlp.experts.{expert}.", mlp.w13[expert], mlp.w2[expert])


def _attention(prefix: str, attention: Attention) -> Iterator[tuple[str, Tensor]]:
    for name in _ATTENTION:
        yield f"{prefix}{name}.weight", getattr(attention, name)
    indexer = attention.indexer
    yield f"{prefix}indexer.wq_b.weight", indexer.wq_b
    yield f"{prefix}indexer.wk.weight", indexer.wk
    yield f"{prefix}indexer.k_norm.weight", indexer.k_norm_weight
    yield f"{prefix}indexer.k_norm.bias", indexer.k_norm_bias
    yield f"{prefix}indexer.weights_proj.weight", indexer.weights_proj


def _mlp(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2)
    yield f"{prefix}gate_proj.weight", gate
    yield f"{prefix}up_proj.weight", up
    yield f"{prefix}down_proj.weight", down


def check_form(config: ModelConfig) -> None:
    """Refuse a checkpoint whose weights are written in a form that no update is rounded to.

    Raises:
        ConfigError: it is neither in FP8 blocks nor in BF16.
    """
    if config.stored_form not in ("fp8_blocks", "bf16"):
        raise ConfigError(
            f"the checkpoint holds {WORDS[config.stored_form]}, and trained weights are rounded to FP8 blocks or BF16; "
            "take a checkpoint in one of these"
        )


def read_weights(model: TrainedModel, source: Checkpoint) -> None:
    """Fill a model with the weights of a checkpoint of any form, dequantized."""
    expected = expected_tensors(model.config)
    matrices = {name.removesuffix("_packed"): tensor for name, tensor in expected.items() if tensor.form is not None}
    with torch.no_grad():
        for name, view in named_tensors(model):
            if name in matrices:
                form, shape = matrices[name].form, matrices[name].matrix
                assert form is not None and shape is not None
                recipe = values_recipe(form, name, shape, "f32")
            elif name in source:
                recipe = take(name, source.info(name).shape, source.info(name).dtype)
            else:
                continue
            view.copy_(torch.from_numpy(np.array(evaluate(recipe, source), np.float32)))


def round_weights(model: TrainedModel, *, mtp: bool = True) -> dict[str, np.ndarray]:
    """Round the weights in place to what a checkpoint holds: FP8 blocks, or the narrower type of each tensor.

    Args:
        model: the model; its parameters are f32.
        mtp: the MTP module, with its copies of embedding and head, as well.

    Returns:
        checkpoint tensor -> its value there, scales of FP8 blocks among them.
    """
    expected, drafts = expected_tensors(model.config), f"model.layers.{model.config.num_hidden_layers}."
    tensors: dict[str, np.ndarray] = {}
    for name, view in named_tensors(model):
        if not mtp and name.startswith(drafts):
            continue
        values = view.detach().numpy()
        stored, scale = _stored(values, expected[name].dtype)
        tensors[name] = stored
        if scale is None:
            values[...] = stored
        else:
            tensors[name + SCALE_SUFFIX] = scale
            dequantize_into(stored, scale, values)
    return tensors


def _stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return f32 values as a checkpoint has them, and the scales of their blocks where that is FP8."""
    if dtype == "f8e4m3":
        return quantize(np.ascontiguousarray(values))
    return values.astype(NUMPY[dtype]), None


def write_checkpoint(folder: Path, model: TrainedModel, preset: Preset, tokenizer: Tokenizer) -> None:
    """Write a model as a checkpoint into a folder that is there: weights in FP8 blocks, and all files beside them."""
    expected = expected_tensors(preset.config)
    shards = split_into_shards(expected, preset.num_shards)
    home = {name: file for file, names in shards.items() for name in names}
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(ShardWriter(folder / file, layout))
            for file, layout in layouts(expected, shards).items()
        }
        for name, view in named_tensors(model):
            stored, scale = _stored(view.detach().float().numpy(), expected[name].dtype)
            writers[home[name]].write(name, stored)
            if scale is not None:
                writers[home[name + SCALE_SUFFIX]].write(name + SCALE_SUFFIX, scale)
    write_sidecars(folder, preset, shards)
    write_tokenizer_files(folder, tokenizer)
