"""What a step is told beside its tokens, and the settings a model is built with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
        form: absorbed (what engines run) or naive attention (spec §3.4); only absorbed can be exported.
    """

    config: ModelConfig
    numerics: Numerics
    activations: Literal["f32", "bf16"] | None = None
    form: AttentionForm = "absorbed"
    parallelism: Parallelism = ONE_RANK
    quantization: Quantization | None = None

    @property
    def rank(self) -> RankSizes:
        """What one rank has of the model's heads, MLPs and experts."""
        return self.parallelism.rank_sizes(self.config)

    @property
    def dtype_name(self) -> Literal["f32", "bf16"]:
        """Activation dtype by our name; also the kv_format of eager caches."""
        return self.activations or self.numerics.activations

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype."""
        return TORCH_DTYPES[self.dtype_name]


@dataclass(frozen=True)
class Step:
    """One [B, Q] step: where its tokens stand and which cache slots they own.

    Attributes:
        positions: [B, Q] int64, absolute; −1 pads.
        slot_mapping: [B, Q] int64; −1 pads.
        block_table: [B, MB] int32; unused entries 0.
        cos, sin: [B, Q, R / 2] f32, looked up once per step.
        hadamard: [D, D] f32, or None when indexer vectors are not rotated by it.
        expert_map: [n_routed_experts] int32, expert -> its place on this rank or −1; None when all are here.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    cos: Tensor
    sin: Tensor
    hadamard: Tensor | None
    expert_map: Tensor | None = None
