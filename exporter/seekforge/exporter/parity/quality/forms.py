"""Reference forms: the PyTorch model with one thing rounded, in FP32 otherwise. None of them is an engine.

A form says what a precision costs by itself, also one that no backend here computes in. What it would store is counted
as such an engine would store it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.layers import Fp8Linear, swiglu
from seekforge.exporter.models.shared.moe import Experts
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import EXACT, FP8, Numerics
from seekforge.formats.quality import FormName
from seekforge.formats.quantization import nvfp4
from seekforge.formats.weight_recipes import TensorSource
from seekforge.plugins.quant import INDEX_KEY_BYTES, dequantize_weight, latent_record_bytes


@dataclass(frozen=True)
class WeightSizes:
    """What a checkpoint holds.

    Attributes:
        fp8: values in FP8.
        experts: those of them that are of routed experts.
        others: bytes of those in other types, without scales.
        scales: bytes of the scales of FP8 values.
    """

    fp8: int
    experts: int
    others: int
    scales: int


@dataclass(frozen=True)
class Form:
    """How the PyTorch model computes.

    Attributes:
        does: what is rounded, for people.
        numerics: roundings of the model's own.
        activations: dtype of activations.
        caches: how caches are stored.
        weights: how the weights are that a checkpoint has in FP8; nvfp4_experts: routed experts in NVFP4, as engines
            for Blackwell hold them.
    """

    does: str
    numerics: Numerics = EXACT
    activations: Literal["f32", "bf16"] = "f32"
    caches: Literal["f32", "bf16", "fp8", "nvfp4"] = "f32"
    weights: Literal["fp8", "nvfp4", "nvfp4_experts"] = "fp8"

    def session(self, config: ModelConfig, source: TensorSource) -> TorchSession:
        """Return the model in this form; `source` must stay open."""
        dtype = self.caches if self.caches == "bf16" else None
        experts = self.weights == "nvfp4_experts"
        settings = Settings(config, self.numerics, self.activations, caches=dtype, nvfp4_experts=experts)
        return _FormSession(self, settings, source)

    def cache_bytes(self, config: ModelConfig) -> float:
        """Return the bytes of one cached token, over all layers and the MTP layer."""
        caches = family_of(config).caches
        layers = range(config.num_hidden_layers + (config.mtp_layer is not None))
        return sum(_CACHE_BYTES[self.caches](config, caches(config, layer)) for layer in layers)

    def weight_bytes(self, sizes: WeightSizes) -> float:
        """Return the bytes of all weights."""
        if self.weights == "nvfp4":
            return sizes.fp8 * nvfp4.BITS / 8 + sizes.others
        saved = sizes.experts * (1 - nvfp4.BITS / 8) if self.weights == "nvfp4_experts" else 0
        return sizes.fp8 + sizes.scales + sizes.others - saved


FORMS: Final[dict[FormName, Form]] = {
    "exact": Form("FP32 throughout, with the checkpoint's FP8 weights"),
    "fp8": Form("FP8 activations, caches and indexer, as the release computes", numerics=FP8, caches="fp8"),
    "bf16": Form("BF16 activations and caches", activations="bf16", caches="bf16"),
    "kv_fp8": Form("FP8 caches", numerics=replace(EXACT, kv_fp8=True, hadamard=True, indexer_fp8=True), caches="fp8"),
    "kv_bf16": Form("BF16 caches", caches="bf16"),
    "nvfp4": Form("NVFP4 weights (reference, no engine)", weights="nvfp4"),
    "nvfp4_experts": Form("NVFP4 routed experts, as engines of precision nvfp4 hold them", weights="nvfp4_experts"),
    "kv_nvfp4": Form(
        "NVFP4 latent cache, FP8 indexer keys (reference, no engine)",
        numerics=replace(EXACT, hadamard=True, indexer_fp8=True),
        caches="nvfp4",
    ),
}


def _plain_bytes(caches: Mapping[str, int], itemsize: int) -> int:
    return itemsize * sum(caches.values())


def _index_bytes(caches: Mapping[str, int]) -> int:
    """The indexer's key in FP8, in layers that have one of their own."""
    return INDEX_KEY_BYTES if "index_cache" in caches else 0


def _fp8_bytes(config: ModelConfig, caches: Mapping[str, int]) -> int:
    return latent_record_bytes(config.kv_lora_rank, config.qk_rope_head_dim) + _index_bytes(caches)


def _nvfp4_bytes(config: ModelConfig, caches: Mapping[str, int]) -> float:
    """The latent in NVFP4, the rotary key in BF16, the indexer's key in FP8."""
    return config.kv_lora_rank * nvfp4.BITS / 8 + 2 * config.qk_rope_head_dim + _index_bytes(caches)


#: Bytes that one token has in the caches of a layer: kind of cache -> values of a token.
_CACHE_BYTES: Final[dict[str, Callable[[ModelConfig, Mapping[str, int]], float]]] = {
    "f32": lambda _, caches: _plain_bytes(caches, 4),
    "bf16": lambda _, caches: _plain_bytes(caches, 2),
    "fp8": _fp8_bytes,
    "nvfp4": _nvfp4_bytes,
}


class _FormSession(TorchSession):
    """A session whose modules are changed once their weights are there."""

    def __init__(self, form: Form, settings: Settings, source: TensorSource) -> None:
        super().__init__(settings, source)
        self._form = form
        self._changed: set[str] = set()

    def module(self, graph: str = "model") -> Any:
        module = super().module(graph)
        if graph not in self._changed:
            self._changed.add(graph)
            layers: Any = module.layers
            for layer in layers.values():
                if self._form.weights == "nvfp4":
                    _round_weights(layer)
                if self._form.caches == "nvfp4":
                    layer.self_attn.kv_a_layernorm.register_forward_hook(_round_latent)
        return module


def _round_latent(module: nn.Module, inputs: tuple[Tensor, ...], latent: Tensor) -> Tensor:
    """Round what is cached of a token. The scale of the tensor is 1: a cache is written before all of it is known."""
    return _round_trip(latent, tensor_scale=1.0)


def _round_trip(values: Tensor, tensor_scale: float | None = None) -> Tensor:
    return torch.from_numpy(nvfp4.round_trip(values.float().numpy(), tensor_scale)).to(values.dtype)


def _round_weights(layer: Any) -> None:
    """Replace all products of FP8 weights of a layer by products of the same weights in NVFP4, along K."""
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Fp8Linear):
                setattr(module, name, _Product(_round_trip(dequantize_weight(child.weight, child.weight_scale))))
            elif isinstance(child, Experts):
                setattr(module, name, _RoundedExperts(child))
    attention = layer.self_attn
    for name in ("w_uk", "w_uv"):  # rows of kv_b_proj, whose K is the latent
        setattr(attention, name, nn.Parameter(_round_trip(getattr(attention, name)), requires_grad=False))


class _Product(nn.Module):
    """y = x · Wᵀ in f32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return (x.float() @ self.weight.T).to(x.dtype)


class _RoundedExperts(nn.Module):
    """Routed experts with f32 weights."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        pairs = ((experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale))
        self.gate_up, self.down = (
            [_Product(_round_trip(dequantize_weight(w, s))) for w, s in zip(weights, scales, strict=True)]
            for weights, scales in pairs
        )

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """[T, hidden_size] -> weighted sum of the chosen experts, [T, hidden_size] f32."""
        y = torch.zeros_like(x, dtype=torch.float32)
        for e in expert_ids.unique().tolist():
            rows, column = torch.nonzero(expert_ids == e, as_tuple=True)
            y[rows] += self.down[e](swiglu(self.gate_up[e](x[rows]))).float() * expert_weights[rows, column, None]
        return y
