"""One layer of the PyTorch model as a list of small operations between tap points.

Run from its own values, the list is the layer: the free run of the reference, whose every step is seen. Run from the
values that an engine had at each point, each operation answers for itself alone: what it gives differs from the
engine's value by the order of a sum and nothing else, in every numerics, since both sides quantise the same numbers.
So the first operation that differs by more is where the fault is, and nothing before it or behind it is blamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seekforge.exporter.model.attention import Attention
from seekforge.exporter.model.layers import Mlp, rope_interleaved, swiglu
from seekforge.exporter.model.model import DecoderLayer, MtpModel, StepModel
from seekforge.exporter.model.moe import Moe
from seekforge.exporter.model.step import Settings, Step
from seekforge.exporter.model.weights import recipes, to_torch
from seekforge.plugins.dsa_attention.reference import dsa_attention
from seekforge.plugins.dsa_cache_write.reference import dsa_cache_write
from seekforge.plugins.dsa_indexer.reference import dsa_indexer
from seekforge.plugins.formats.bindings import Recipe, TensorSource, evaluate, tensors_of
from seekforge.plugins.moe_route.reference import moe_route

#: Points of the next layer, as a layer's operations call them.
NEXT = {"next_hidden_states": "hidden_states", "next_residual": "residual"}
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Columns [start, stop) of an operation's output that come from one checkpoint module."""

    start: int
    stop: int
    module: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        module: path of the module below the layer, as the checkpoint calls it.
        does: what it computes, for people.
        inputs: points it reads. `residual` may be missing (layer 0, MTP).
        output: point it gives.
        run: values of its inputs -> its output.
        tensors: checkpoint tensors it reads, full names.
        parts: of an output that several checkpoint modules share.
    """

    module: str
    does: str
    inputs: tuple[str, ...]
    output: str
    run: Callable[[Values], Tensor]
    tensors: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()


@dataclass
class LayerState:
    """What one side has cached for one layer, and the step it is in."""

    latent: Tensor
    index: Tensor
    step: Step = field(init=False)


class LayerModule:
    """One decoder layer with its weights, and its operations. Nothing of other layers is in memory.

    Args:
        settings: how it computes.
        layer: absolute number; the MTP layer's for the MTP module.
        source: the checkpoint.
    """

    def __init__(self, settings: Settings, layer: int, source: TensorSource) -> None:
        self.settings, self.config, self.layer = settings, settings.config, layer
        with torch.device("meta"):
            self.module = DecoderLayer(settings, layer)
        prefix = f"layers.{layer}."
        self._recipes = {
            name.removeprefix(prefix): recipe
            for name, recipe in model_recipes(settings, layer).items()
            if name.startswith(prefix)
        }
        state = {name: to_torch(evaluate(recipe, source)) for name, recipe in self._recipes.items()}
        self.module.load_state_dict(state, strict=True, assign=True)

    def new_state(self, num_blocks: int) -> LayerState:
        """Return zeroed caches."""
        slots, dtype = num_blocks * 64, self.settings.dtype
        return LayerState(
            torch.zeros(slots, self.config.latent_dim, dtype=dtype),
            torch.zeros(slots, self.config.index_head_dim, dtype=dtype),
        )

    def tensors(self, *modules: str) -> tuple[str, ...]:
        """Return the checkpoint tensors behind the parameters of modules of this layer."""
        found = [
            tensor
            for name, recipe in self._recipes.items()
            for module in modules
            if name == module or name.startswith(f"{module}.")
            for tensor in sorted(tensors_of(recipe))
        ]
        return tuple(dict.fromkeys(found))

    def write_cache(self, state: LayerState, values: Values) -> None:
        """Put this step's rows into the caches of `state`."""
        numerics, kv = self.settings.numerics, self.settings.dtype_name
        state.latent, state.index = dsa_cache_write(
            state.latent,
            state.index,
            values["kv_latent"],
            values["k_pe"],
            values["index_k"],
            state.step.slot_mapping,
            kv,
            kv,
            numerics.kv_fp8,
            numerics.indexer_fp8,
        )

    def before_cache(self, state: LayerState) -> list[Op]:
        """Return the operations up to the cache write."""
        attention, step = self.module.self_attn, state.step
        config, splits = self.config, attention.splits
        prefix = f"model.layers.{self.layer}.self_attn."
        starts = [sum(splits[:i]) for i in range(5)]

        def columns(part: int) -> Callable[[Values], Tensor]:
            return lambda v: v["qkv_a"][..., starts[part] : starts[part + 1]]

        raw_q, raw_index, raw_c, raw_pe = (columns(i) for i in range(4))
        fused = [("q_a_proj", 0, 1), ("indexer.wk", 1, 2), ("kv_a_proj_with_mqa", 2, 4)]

        def normed(v: Values) -> Tensor:
            if "residual" not in v:
                return self.module.input_layernorm(v["hidden_states"])
            return self.module.input_layernorm.add(v["hidden_states"], v["residual"])[0]

        def q_heads(v: Values) -> Tensor:
            return v["q_b"].unflatten(-1, (config.num_attention_heads, config.qk_head_dim))

        def q_latent(v: Values) -> Tensor:
            return (q_heads(v)[..., : config.qk_nope_head_dim].transpose(1, 2) @ attention.w_uk).transpose(1, 2)

        def q_pe(v: Values) -> Tensor:
            x = q_heads(v)[..., config.qk_nope_head_dim :]
            return rope_interleaved(x, step.cos.unsqueeze(2), step.sin.unsqueeze(2))

        names = self.tensors
        return [
            Op(
                "input_layernorm",
                "norm before attention",
                ("hidden_states", "residual"),
                "attn_norm",
                normed,
                names("input_layernorm"),
            ),
            Op(
                "self_attn.qkv_a_proj",
                "q_a, index key and kv_a as one product",
                ("attn_norm",),
                "qkv_a",
                lambda v: attention.qkv_a_proj(v["attn_norm"]),
                names("self_attn.qkv_a_proj"),
                tuple(
                    Part(
                        starts[a],
                        starts[b],
                        f"self_attn.{name}",
                        (f"{prefix}{name}.weight", f"{prefix}{name}.weight_scale_inv"),
                    )
                    for name, a, b in fused
                ),
            ),
            Op(
                "self_attn.q_a_layernorm",
                "norm of the query latent",
                ("qkv_a",),
                "q_a_norm",
                lambda v: attention.q_a_layernorm(raw_q(v)),
                names("self_attn.q_a_layernorm"),
            ),
            Op(
                "self_attn.q_b_proj",
                "queries of all heads",
                ("q_a_norm",),
                "q_b",
                lambda v: attention.q_b_proj(v["q_a_norm"]),
                names("self_attn.q_b_proj"),
            ),
            Op("self_attn.rotary (queries)", "RoPE of the queries, interleaved pairs", ("q_b",), "q_pe", q_pe),
            Op(
                "self_attn.kv_b_proj (keys)",
                "queries in the latent space",
                ("q_b",),
                "q_latent",
                q_latent,
                names("self_attn.w_uk"),
            ),
            Op(
                "self_attn.kv_a_layernorm",
                "norm of the cached latent",
                ("qkv_a",),
                "kv_latent",
                lambda v: attention.kv_a_layernorm(raw_c(v)),
                names("self_attn.kv_a_layernorm"),
            ),
            Op(
                "self_attn.rotary (keys)",
                "RoPE of the shared key, interleaved pairs",
                ("qkv_a",),
                "k_pe",
                lambda v: rope_interleaved(raw_pe(v), step.cos, step.sin),
            ),
            Op(
                "self_attn.indexer.k_norm",
                "LayerNorm of the index key",
                ("qkv_a",),
                "index_k_norm",
                lambda v: attention.indexer.k_norm(raw_index(v)),
                names("self_attn.indexer.k_norm"),
            ),
            Op(
                "self_attn.indexer (rotation of keys)",
                "half-split RoPE and Hadamard of the index key",
                ("index_k_norm",),
                "index_k",
                lambda v: attention.indexer._rotate(v["index_k_norm"], step.cos, step.sin, step),
            ),
        ]

    def after_cache(self, state: LayerState) -> list[Op]:
        """Return the operations behind the cache write: indexer, attention, MLP."""
        attention = self.module.self_attn
        return [*self._attention(attention, state), *self._mlp(state)]

    def _attention(self, attention: Attention, state: LayerState) -> list[Op]:
        config, numerics, step = self.config, self.settings.numerics, state.step
        kv, names = self.settings.dtype_name, self.tensors

        def index_q(v: Values) -> Tensor:
            q = v["wq_b"].unflatten(-1, (config.index_n_heads, -1))
            return attention.indexer._rotate(q, step.cos.unsqueeze(2), step.sin.unsqueeze(2), step)

        def o(v: Values) -> Tensor:
            return (v["o_latent"].transpose(1, 2) @ attention.w_uv.transpose(1, 2)).transpose(1, 2).flatten(2)

        return [
            Op(
                "self_attn.indexer.wq_b",
                "index queries",
                ("q_a_norm",),
                "wq_b",
                lambda v: attention.indexer.wq_b(v["q_a_norm"]),
                names("self_attn.indexer.wq_b"),
            ),
            Op(
                "self_attn.indexer (rotation of queries)",
                "half-split RoPE and Hadamard of the index queries",
                ("wq_b",),
                "index_q",
                index_q,
            ),
            Op(
                "self_attn.indexer.weights_proj",
                "weights of the index heads",
                ("attn_norm",),
                "index_w",
                lambda v: attention.indexer.head_weights(v["attn_norm"]),
                names("self_attn.indexer.weights_proj"),
            ),
            Op(
                "self_attn.indexer (selection)",
                "scores, and the best index_topk keys",
                ("index_q", "index_w"),
                "topk_indices",
                lambda v: dsa_indexer(
                    v["index_q"],
                    v["index_w"],
                    state.index,
                    step.block_table,
                    step.positions,
                    config.index_topk,
                    numerics.indexer_fp8,
                    kv,
                ),
            ),
            Op(
                "self_attn (sparse attention)",
                "softmax over the chosen keys",
                ("q_latent", "q_pe", "topk_indices"),
                "o_latent",
                lambda v: dsa_attention(
                    v["q_latent"],
                    v["q_pe"],
                    state.latent,
                    step.block_table,
                    v["topk_indices"],
                    config.softmax_scale,
                    kv,
                ),
            ),
            Op("self_attn.kv_b_proj (values)", "values of all heads", ("o_latent",), "o", o, names("self_attn.w_uv")),
            Op(
                "self_attn.o_proj",
                "output projection",
                ("o",),
                "attn_out",
                lambda v: attention.o_proj(v["o"]),
                names("self_attn.o_proj"),
            ),
        ]

    def _mlp(self, state: LayerState) -> list[Op]:
        layer, names = self.module, self.tensors

        def stream(v: Values) -> Tensor:
            if "residual" not in v:
                return v["hidden_states"]
            return (v["hidden_states"].float() + v["residual"].float()).to(self.settings.dtype)

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
            return ops + self._moe(layer.mlp, state)
        return ops + self._dense(layer.mlp, "mlp", "mlp_norm", "gate_up", "act", "next_hidden_states")

    def _dense(self, mlp: Mlp, module: str, before: str, gate_up: str, act: str, after: str) -> list[Op]:
        half = mlp.gate_up_proj.weight.shape[0] // 2
        prefix = f"model.layers.{self.layer}.{module}."
        parts = tuple(
            Part(i * half, (i + 1) * half, f"{module}.{p}", (f"{prefix}{p}.weight", f"{prefix}{p}.weight_scale_inv"))
            for i, p in enumerate(("gate_proj", "up_proj"))
        )
        return [
            Op(
                f"{module}.gate_up_proj",
                "gate and up as one product",
                (before,),
                gate_up,
                lambda v: mlp.gate_up_proj(v[before]),
                self.tensors(f"{module}.gate_up_proj"),
                parts,
            ),
            Op(f"{module} (SwiGLU)", "silu(gate) · up", (gate_up,), act, lambda v: swiglu(v[gate_up])),
            Op(
                f"{module}.down_proj",
                "down projection",
                (act,),
                after,
                lambda v: mlp.down_proj(v[act]),
                self.tensors(f"{module}.down_proj"),
            ),
        ]

    def _moe(self, moe: Moe, state: LayerState) -> list[Op]:
        config, names = self.config, self.tensors
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
            return (v["routed"] + v["shared"].float()).to(self.settings.dtype).unflatten(0, tuple(shape))

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
            *self._dense(
                moe.shared_experts, "mlp.shared_experts", "mlp_norm", "shared_gate_up", "shared_act", "shared"
            ),
            Op("mlp (sum)", "routed and shared experts together", ("routed", "shared"), "next_hidden_states", combined),
        ]


def model_recipes(settings: Settings, layer: int) -> dict[str, Recipe]:
    """Return the recipes of the program that holds `layer`, without any weight."""
    with torch.device("meta"):
        mtp = layer == settings.config.mtp_layer
        model = MtpModel(settings) if mtp else StepModel(settings, (layer, layer + 1))
    return recipes(model)
