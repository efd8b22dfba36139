"""The settings that a model is built with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.int_quant import Quantization
from seekforge.formats.numerics import Numerics
from seekforge.formats.parallelism import ONE_RANK, Parallelism, RankSizes
from seekforge.plugins.torch_ops import TORCH_DTYPES

AttentionForm = Literal["absorbed", "naive"]


@dataclass(frozen=True)
class Settings:
    """How a model computes.

    Attributes:
        config: the checkpoint's configuration.
        numerics: which roundings it makes.
        activations: dtype of activations and caches; None takes that of `numerics`.
        parallelism: how ranks share the model; parameters and graph are those of one of them.
        quantization: which weights are codes, as in an int8 or int4 engine; None: none.
        caches: dtype of the caches; None takes that of the activations.
        nvfp4_experts: whether routed experts are rows of NVFP4, as in engines of precision nvfp4.
        form: absorbed (what engines run) or naive attention (spec §3.4); only absorbed can be exported.
    """

    config: ModelConfig
    numerics: Numerics
    activations: Literal["f32", "bf16"] | None = None
    form: AttentionForm = "absorbed"
    parallelism: Parallelism = ONE_RANK
    quantization: Quantization | None = None
    caches: Literal["f32", "bf16"] | None = None
    nvfp4_experts: bool = False

    @property
    def rank(self) -> RankSizes:
        """What one rank has of the model's heads, MLPs and experts."""
        return self.parallelism.rank_sizes(self.config)

    @property
    def keeps_weights(self) -> bool:
        """Whether products multiply with the values of the checkpoint, and not with FP8 blocks."""
        return self.config.keeps_weights(self.numerics)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the matrices that are FP8 blocks, or kept."""
        return self.dtype if self.keeps_weights else torch.float8_e4m3fn

    @property
    def dtype_name(self) -> Literal["f32", "bf16"]:
        """Activation dtype by our name."""
        return self.activations or self.numerics.activations

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype."""
        return TORCH_DTYPES[self.dtype_name]

    @property
    def cache_dtype_name(self) -> Literal["f32", "bf16"]:
        """Cache dtype by our name, which is the kv_format of eager caches."""
        return self.caches or self.dtype_name

    @property
    def cache_dtype(self) -> torch.dtype:
        """Cache dtype."""
        return TORCH_DTYPES[self.cache_dtype_name]
