"""Which checkpoint tensors become which parameter: the recipes behind bindings.json, and loading by them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from seekforge.common.errors import ProgramError
from seekforge.exporter.models import family_of
from seekforge.exporter.models.parameters import Parameter, Tensor, recipes_of
from seekforge.exporter.models.shared.model import MtpModel, StepModel
from seekforge.exporter.models.shared.moe import Experts
from seekforge.formats.checkpoint.model_config import ModelConfig, RopeScaling
from seekforge.formats.int_quant import quantized_recipes
from seekforge.formats.weight_recipes import (
    QuantizedOnce,
    Recipe,
    TensorSource,
    evaluate,
    expert_map,
    hadamard_table,
    nvfp4_rows,
    nvfp4_scales,
    rope_table,
    vocab_start,
)
from seekforge.plugins.moe_experts.reference import nvfp4_values
from seekforge.plugins.quant import dequantize_weight
from seekforge.plugins.torch_ops import DTYPE_NAMES

#: Why the MTP layer's own embedding and head are not read.
_COPY = "checked equal when weights are read, stored once"
#: Most bytes of f32 that `widen_weights` makes of one module: layers of 671B stay as they are.
WIDE_BYTES = 512 << 20


#: Ends of the names of what has rows of NVFP4 where settings say so.
_EXPERTS = (".experts.w13", ".experts.w2")


def recipes(model: StepModel | MtpModel) -> dict[str, Recipe]:
    """Return parameter name -> recipe for every parameter of `model`, in `named_parameters` order.

    Raises:
        ProgramError: a parameter has no recipe, or one of another shape (a bug of ours, found at export).
    """
    config, dtype, parallelism = model.settings.config, model.settings.dtype_name, model.settings.parallelism
    table = table_recipes(config) | {
        "expert_map": expert_map(config.n_routed_experts, parallelism),
        "vocab_start": vocab_start(config.vocab_size, parallelism),
    }
    family = family_of(config)

    def made(parameters: Sequence[Parameter], tensors: Sequence[Tensor], source: str, target: str) -> dict[str, Recipe]:
        return recipes_of(
            parameters,
            tensors,
            config,
            source=source,
            target=target,
            dtype=dtype,
            parallelism=parallelism,
            keeps=model.settings.keeps_weights,
        )

    first, last = family.end_tensors(config)
    table |= made(family.end_parameters(), (*first, *last), "", "")
    for layer in model.layer_numbers:
        source, tensors = f"model.layers.{layer}.", family.layer_tensors(config, layer)
        table |= made(family.layer_parameters(config.layer_kind(layer)), tensors, source, f"layers.{layer}.")
    if isinstance(model, MtpModel):
        layer = config.mtp_layer
        assert layer is not None
        table |= made(family.mtp_parameters(), family.layer_tensors(config, layer), f"model.layers.{layer}.", "")
    if model.settings.quantization is not None:
        table = quantized_recipes(table, model.settings.quantization)
    if model.settings.nvfp4_experts:
        table |= {name: nvfp4_rows(recipe) for name, recipe in table.items() if name.endswith(_EXPERTS)}
        scales = tuple(f"{name}_scale" for name in _EXPERTS)
        table |= {name: nvfp4_scales(recipe) for name, recipe in table.items() if name.endswith(scales)}
    result = {}
    for name, parameter in model.named_parameters():
        recipe = table.get(name)
        made_of = None if recipe is None else (recipe.shape, recipe.dtype)
        expected = (tuple(parameter.shape), DTYPE_NAMES[parameter.dtype])
        if recipe is None or made_of != expected:
            raise ProgramError(f"weight input {name}: recipe gives {made_of}, the model needs {expected}")
        result[name] = recipe
    return result


def unused_tensors(config: ModelConfig) -> dict[str, str]:
    """Return the checkpoint tensors that no program reads, with the reason."""
    copies = family_of(config).mtp_copies(config)
    return {name: f"physical copy of {main}; {_COPY}" for name, main in copies.items()}


def load_weights(model: StepModel | MtpModel, source: TensorSource) -> None:
    """Fill every parameter of `model` from a checkpoint, one at a time.

    Parameters that are plain checkpoint tensors share the memory of what `source` gives.
    """
    once = QuantizedOnce.of(source)
    state = {name: to_torch(evaluate(recipe, once)) for name, recipe in recipes(model).items()}
    model.load_state_dict(state, strict=True, assign=True)


def widen_weights(module: nn.Module) -> None:
    """Dequantize the FP8 weights of a module once, and not in each of its products; none if all take too much memory.

    Nothing else changes, to the bit: the products make the same values of FP8 weights, and of rows of NVFP4, whenever
    they are called, and take f32 weights, whose scales are 1, as they are.
    """
    narrow = [
        (owner, name, weight)
        for owner in module.modules()
        for name, weight in owner.named_parameters(recurse=False)
        if weight.dtype == torch.float8_e4m3fn or (isinstance(owner, Experts) and weight.dtype == torch.int8)
    ]
    if sum(weight.numel() * torch.float32.itemsize for _, _, weight in narrow) > WIDE_BYTES:
        return
    for owner, name, weight in narrow:
        scale = owner.get_parameter(f"{name}_scale")
        if weight.dtype == torch.int8:
            wide = nvfp4_values(weight, scale)
        elif weight.dim() == 2:
            wide = dequantize_weight(weight, scale)
        else:  # of experts
            wide = torch.stack([dequantize_weight(*pair) for pair in zip(weight, scale, strict=True)])
        setattr(owner, name, nn.Parameter(wide, requires_grad=False))
        setattr(owner, f"{name}_scale", nn.Parameter(torch.ones_like(scale), requires_grad=False))


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Return a NumPy array (ml_dtypes included) as a tensor that shares its memory; unaligned ones are copied."""
    carriers = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    array = np.require(array, requirements=["C", "ALIGNED"])
    carrier, dtype = carriers.get(array.dtype.name, (array.dtype, None))
    with warnings.catch_warnings():  # a source may give read-only arrays, and torch says so; nothing writes to a weight
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array.view(carrier))
    return tensor if dtype is None else tensor.view(dtype)


def table_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Return the recipes of the tables that a model computes: those of RoPE, and Hadamard where it has an indexer."""
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
    } | ({"hadamard": hadamard_table(config.index_head_dim)} if config.index_head_dim else {})


def _magnitude(scaling: RopeScaling) -> float:
    """Factor on cos and sin: 1 when mscale equals mscale_all_dim, as in V3.2 (spec §1.2)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
