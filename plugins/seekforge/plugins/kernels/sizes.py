"""The sizes and attributes that a model fixes for each operator: what its kernels are compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import FP8
from seekforge.formats.parallelism import ONE_RANK, Parallelism
from seekforge.plugins.operator import RankModel
from seekforge.plugins.registry import KERNEL_FORMS

#: Cache format of GPU targets unless a build says otherwise.
DEFAULT_FORMAT: Final = "fp8_ds"
_FP8: Final = FP8.model_dump()


def rank_model(
    config: ModelConfig,
    *,
    kv_format: str = DEFAULT_FORMAT,
    numerics: Mapping[str, Any] = _FP8,
    parallelism: Parallelism = ONE_RANK,
    nvfp4_experts: bool = False,
) -> RankModel:
    """Return what one rank computes of a model.

    Args:
        config: the model's.
        kv_format: layout and dtype of both caches.
        numerics: fields of `formats.numerics.Numerics`; by default those of the official reference.
        parallelism: how ranks share the model; sizes are those of one of them.
        nvfp4_experts: whether it has the weights of experts in NVFP4.
    """
    return RankModel(
        config=config,
        numerics=numerics,
        kv_format=kv_format,
        parallelism=parallelism,
        nvfp4_experts=nvfp4_experts,
    )


def operators(config: ModelConfig, **forms: Any) -> dict[str, dict[str, Any]]:
    """Return op_type -> the static sizes and attributes of a model, under the symbols of the specs.

    Args:
        config: the model's.
        forms: the other arguments of `rank_model`.
    """
    return static_sizes(rank_model(config, **forms))


def static_sizes(model: RankModel) -> dict[str, dict[str, Any]]:
    """Return the same of what one rank computes."""
    return {op: form.static_sizes(model) for op, form in KERNEL_FORMS.items()}
