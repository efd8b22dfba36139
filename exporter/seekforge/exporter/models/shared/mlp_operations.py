"""The operations behind a layer's attention: residual stream, MLP or experts (see `layer_operations`)."""

from __future__ import annotations

import torch
from torch import Tensor

from seekforge.exporter.models.shared.layer_operations import LayerModule, LayerState, Op, Part, Values
from seekforge.exporter.models.shared.layers import Mlp, swiglu
from seekforge.exporter.models.shared.moe import Moe
from seekforge.plugins.moe_route.reference import moe_route


def mlp_operations(owner: LayerModule, state: LayerState) -> list[Op]:
    """Return the operations behind attention: the residual stream and the MLP."""
    layer, names = owner.module, owner.tensors

    def stream(v: Values) -> Tensor:
        if "residual" not in v:
            return v["hidden_states"]
        return (v["hidden_states"].float() + v["residual"].float()).to(owner.settings.dtype)

    def normed(v: Values) -> Tensor:
        return layer.post_attention_layernorm.add(v["attn_out"], stream(v))[0]

    stream_inputs = ("attn_out", "hidden_states", "residual")
    ops = [
        Op(
            "residual",
            "residual stream behind attention",
            stream_inputs,
            "next_residual",
            lambda v: layer.post_attention_layernorm.add(v["attn_out"], stream(v))[1],
        ),
        Op(
            "post_attention_layernorm",
            "norm before the MLP",
            stream_inputs,
            "mlp_norm",
            normed if not isinstance(layer.mlp, Moe) else lambda v: normed(v).flatten(0, 1),
            names("post_attention_layernorm"),
        ),
    ]
    if isinstance(layer.mlp, Moe):
        return ops + _moe(owner, layer.mlp, state)
    return ops + _dense(owner, layer.mlp, "mlp", "mlp_norm", "gate_up", "act", "next_hidden_states")


def _dense(owner: LayerModule, mlp: Mlp, module: str, before: str, gate_up: str, act: str, after: str) -> list[Op]:
    half = mlp.gate_up_proj.weight.shape[0] // 2
    parts = tuple(
        Part(i * half, (i + 1) * half, f"{module}.{p}", owner.stored(f"{module}.{p}"))
        for i, p in enumerate(("gate_proj", "up_proj"))
    )
    return [
        owner.apply(f"{module}.gate_up_proj", "gate and up as one product", before, gate_up, mlp.gate_up_proj, parts),
        Op(f"{module} (SwiGLU)", "silu(gate) · up", (gate_up,), act, lambda v: swiglu(v[gate_up])),
        owner.apply(f"{module}.down_proj", "down projection", act, after, mlp.down_proj),
    ]


def _moe(owner: LayerModule, moe: Moe, state: LayerState) -> list[Op]:
    config, names = owner.config, owner.tensors
    gate, shape = moe.gate, state.step.positions.shape

    def route(v: Values) -> tuple[Tensor, Tensor]:
        return moe_route(
            v["router_logits"],
            gate.e_score_correction_bias,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )

    def weights(v: Values) -> Tensor:
        chosen = torch.gather(torch.sigmoid(v["router_logits"]), -1, v["expert_ids"].long())
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor

    def combined(v: Values) -> Tensor:
        return (v["routed"] + v["shared"].float()).to(owner.settings.dtype).unflatten(0, tuple(shape))

    return [
        Op(
            "mlp.gate",
            "router logits",
            ("mlp_norm",),
            "router_logits",
            lambda v: gate(v["mlp_norm"]),
            names("mlp.gate.weight"),
        ),
        Op(
            "mlp.gate (selection)",
            "experts of each token by biased score",
            ("router_logits",),
            "expert_ids",
            lambda v: route(v)[0],
            names("mlp.gate.e_score_correction_bias"),
        ),
        Op(
            "mlp.gate (weights)",
            "weights of the chosen experts by unbiased score",
            ("router_logits", "expert_ids"),
            "expert_weights",
            weights,
        ),
        Op(
            "mlp.experts",
            "the chosen experts, weighted and summed",
            ("mlp_norm", "expert_ids", "expert_weights"),
            "routed",
            lambda v: moe.experts(v["mlp_norm"], v["expert_ids"], v["expert_weights"]),
            names("mlp.experts"),
        ),
        *_dense(owner, moe.shared_experts, "mlp.shared_experts", "mlp_norm", "shared_gate_up", "shared_act", "shared"),
        Op("mlp (sum)", "routed and shared experts together", ("routed", "shared"), "next_hidden_states", combined),
    ]
