"""The model as training runs it: whole sequences, differentiable, in plain f32; weights named as a checkpoint's.

It computes what `exporter.models` computes in exact numerics over paged caches; a test holds the logits equal. What is
there for training alone: documents that do not see each other, attention that is dense or sparse, and the loss of the
indexer (spec §15).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seekforge.exporter.models.shared.weights import table_recipes
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.weight_recipes import rope_rows

K_NORM_EPS = 1e-6


@dataclass
class Choices:
    """What the layers of one pass choose.

    Attributes:
        keys: [B, L, L] bool for each layer, the keys that each position attends to.
        experts: [B·L, num_experts_per_tok] int64 for each MoE layer.
    """

    keys: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)


@dataclass
class Context:
    """What the layers of one pass share.

    Attributes:
        visible: [B, L, L] bool, what each position may see.
        cos, sin: [L, R / 2].
        sparse: attend to the indexer's choice alone.
        rows: [R] positions whose indexer is trained in this pass; None: none.
        random_choice: choose keys by chance in place of the indexer, for tests of what it is worth.
        replay: what the first layers choose, in place of what they would; those behind the last of it choose.
        chosen: filled by the layers: what they chose.
        index_losses: filled by the layers: the indexer's loss, one each.
        loads: filled by the layers: [n_routed_experts] tokens of each expert.
    """

    visible: Tensor
    cos: Tensor
    sin: Tensor
    sparse: bool
    rows: Tensor | None = None
    random_choice: torch.Generator | None = None
    replay: Choices = field(default_factory=Choices)
    chosen: Choices = field(default_factory=Choices)
    index_losses: list[Tensor] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)


def _linear(out_features: int, in_features: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(out_features, in_features) * (gain * in_features**-0.5))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight · x / rms(x)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of [..., L, R]; cos and sin [L, R / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + R/2) of the first R of [..., L, D]."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def rotate_half_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Do the same to x, where no gradient is asked for."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)


class Indexer(nn.Module):
    """Scores by which keys are chosen (spec §3.6), without Hadamard and FP8, which exact numerics leave out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = _linear(heads * dim, config.q_lora_rank)
        self.wk = _linear(dim, config.hidden_size)
        self.k_norm_weight, self.k_norm_bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.weights_proj = _linear(heads, config.hidden_size)

    def keys(self, a: Tensor, context: Context) -> Tensor:
        """[B, L, H] -> [B, L, D]."""
        dim = self.config.index_head_dim
        normed = F.layer_norm(F.linear(a, self.wk), (dim,), self.k_norm_weight, self.k_norm_bias, K_NORM_EPS)
        return rotate_half(normed, context.cos, context.sin)

    def scores(self, a: Tensor, qr: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [B, R, L] scores of queries a [B, R, H], qr [B, R, q_lora_rank] at positions of cos and sin."""
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        batch, rows = a.shape[:2]
        q = F.linear(qr, self.wq_b).view(batch, rows, heads, dim)
        w = F.linear(a, self.weights_proj) * self.config.index_scale
        if torch.is_grad_enabled():
            q = rotate_half(q.transpose(1, 2), cos, sin).flatten(1, 2)  # [B, heads·R, D]
            dots = torch.relu(q @ keys.transpose(1, 2)).view(batch, heads, rows, -1)
            return (dots * w.transpose(1, 2).unsqueeze(-1)).sum(1)
        rotate_half_in_place(q, cos.unsqueeze(1), sin.unsqueeze(1))
        total = torch.zeros(batch, rows, keys.shape[1])
        for head in range(heads):  # small enough to stay in the processor's cache
            dots = torch.relu_(q[:, :, head] @ keys.transpose(1, 2))
            total.addcmul_(dots, w[:, :, head : head + 1])
        return total


class Attention(nn.Module):
    """Multi-head latent attention in its naive form (spec §3.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.q_a_proj = _linear(config.q_lora_rank, config.hidden_size)
        self.q_a_layernorm = nn.Parameter(torch.ones(config.q_lora_rank))
        self.q_b_proj = _linear(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = _linear(config.latent_dim, config.hidden_size)
        self.kv_a_layernorm = nn.Parameter(torch.ones(config.kv_lora_rank))
        self.kv_b_proj = _linear(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o_proj = _linear(config.hidden_size, heads * config.v_head_dim, 0.2)
        self.indexer = Indexer(config)

    def forward(self, a: Tensor, context: Context) -> Tensor:
        """[B, L, H] -> the same."""
        config, eps = self.config, self.config.rms_norm_eps
        batch, length = a.shape[:2]
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        qr = rms_norm(F.linear(a, self.q_a_proj), self.q_a_layernorm, eps)
        q = F.linear(qr, self.q_b_proj).view(batch, length, heads, nope + rope).transpose(1, 2)
        q = torch.cat([q[..., :nope], rotate_interleaved(q[..., nope:], context.cos, context.sin)], -1)
        c, k_pe = F.linear(a, self.kv_a_proj_with_mqa).split([config.kv_lora_rank, rope], -1)
        k_pe = rotate_interleaved(k_pe, context.cos, context.sin).unsqueeze(1).expand(-1, heads, -1, -1)
        c = rms_norm(c, self.kv_a_layernorm, eps)
        kv = F.linear(c, self.kv_b_proj).view(batch, length, heads, nope + config.v_head_dim).transpose(1, 2)
        k, v = torch.cat([kv[..., :nope], k_pe], -1), kv[..., nope:]
        chosen = self._chosen(a, qr, q, k, context)
        o = F.scaled_dot_product_attention(
            q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1])), chosen.unsqueeze(1), scale=config.softmax_scale
        )[..., : config.v_head_dim]
        return F.linear(o.transpose(1, 2).reshape(batch, length, -1), self.o_proj)

    def _chosen(self, a: Tensor, qr: Tensor, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Return [B, L, L] bool: what is attended to; adds the indexer's loss to the context."""
        a, qr, topk = a.detach(), qr.detach(), self.config.index_topk
        chosen, number = context.visible, len(context.chosen.keys)
        if number < len(context.replay.keys):
            chosen = context.replay.keys[number]
        elif context.sparse and a.shape[1] > topk:
            with torch.no_grad():
                if context.random_choice is not None:
                    scores = torch.rand(chosen.shape, generator=context.random_choice)
                else:
                    scores = self.indexer.scores(a, qr, self.indexer.keys(a, context), context.cos, context.sin)
                best = scores.masked_fill_(~chosen, -torch.inf).topk(topk, sorted=False).indices
                chosen = torch.zeros_like(chosen).scatter_(-1, best, True) & chosen
        context.chosen.keys.append(chosen)
        rows = context.rows
        if rows is not None:
            scores = self.indexer.scores(
                a[:, rows], qr[:, rows], self.indexer.keys(a, context), context.cos[rows], context.sin[rows]
            )
            mask = chosen[:, rows]
            with torch.no_grad():
                attended = (q[:, :, rows] @ k.transpose(-1, -2)) * self.config.softmax_scale
                target = attended.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1).mean(1)
            predicted = scores.masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0.0)
            context.index_losses.append(F.kl_div(predicted, target, reduction="sum") / (mask.shape[0] * mask.shape[1]))
        return chosen


class Mlp(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = _linear(2 * intermediate_size, hidden_size)
        self.down_proj = _linear(hidden_size, intermediate_size, 0.2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, L, H] -> the same."""
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)


class Moe(nn.Module):
    """Routed experts and the shared expert (spec §4); the bias of the router takes no gradient."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inter = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = _linear(experts, hidden)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.w13 = nn.Parameter(torch.randn(experts, 2 * inter, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, inter) * (0.2 * inter**-0.5))
        self.shared_experts = Mlp(hidden, config.n_shared_experts * inter)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, L, H] -> the same."""
        config = self.config
        tokens = x.flatten(0, 1)
        scores = torch.sigmoid(F.linear(tokens, self.gate))
        number = len(context.chosen.experts)
        ids = context.replay.experts[number] if number < len(context.replay.experts) else self._route(scores.detach())
        context.chosen.experts.append(ids)
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        flat = ids.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=config.n_routed_experts)
        context.loads.append(counts)
        source = order // config.num_experts_per_tok
        parts = tokens[source].split(counts.tolist())
        w13, w2, outs = self.w13.unbind(), self.w2.unbind(), []
        for expert, part in enumerate(parts):
            gate, up = F.linear(part, w13[expert]).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, w2[expert]))
        routed = torch.cat(outs) * weights.flatten()[order].unsqueeze(1)
        y = torch.zeros_like(tokens).index_add(0, source, routed)
        return y.view_as(x) + self.shared_experts(x, context)

    def _route(self, scores: Tensor) -> Tensor:
        """[T, E] -> the chosen experts [T, num_experts_per_tok]."""
        config = self.config
        groups = (scores + self.e_score_correction_bias).unflatten(-1, (config.n_group, -1))
        kept = groups.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
        mask = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(-1, kept, True)
        selecting = groups.masked_fill(~mask.unsqueeze(-1), -torch.inf).flatten(-2)
        return selecting.topk(config.num_experts_per_tok, -1).indices


class Layer(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        is_moe = config.is_moe_layer(layer)
        self.mlp = Moe(config) if is_moe else Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, L, H] -> the same."""
        x = x + self.self_attn(rms_norm(x, self.input_layernorm, self.eps), context)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps), context)


class TrainedModel(nn.Module):
    """All layers, the ends and the MTP module."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Parameter(torch.randn(config.vocab_size, hidden) * 0.5)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(hidden))
        self.lm_head = nn.Parameter(torch.randn(config.vocab_size, hidden) * 0.02)
        self.mtp: Mtp | None = Mtp(config) if config.mtp_layer is not None else None
        for name, recipe in table_recipes(config).items():
            if name != "hadamard":
                self.register_buffer(name, torch.from_numpy(rope_rows(recipe, 0, recipe.shape[0])), persistent=False)

    def context(self, documents: Tensor, *, sparse: bool, rows: Tensor | None = None) -> Context:
        """Return what layers share for documents [B, L], the number of each position's document."""
        length = documents.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = (documents.unsqueeze(1) == documents.unsqueeze(2)) & causal
        return Context(visible, self.rope_cos[:length], self.rope_sin[:length], sparse, rows)

    def hidden(self, ids: Tensor, context: Context) -> Tensor:
        """ids [B, L] -> [B, L, H] behind the last norm."""
        x = F.embedding(ids, self.embed_tokens)
        for layer in self.layers:
            x = layer(x, context)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def draft(self, hidden: Tensor, next_ids: Tensor, context: Context) -> Tensor:
        """hidden [B, L, H] and the next tokens [B, L] -> [B, L, H] for the token after that (spec §6)."""
        assert self.mtp is not None
        return self.mtp(hidden, F.embedding(next_ids, self.embed_tokens), context)


class Mtp(nn.Module):
    """The multi-token-prediction module; embedding and head are the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        hidden = config.hidden_size
        assert config.mtp_layer is not None
        self.enorm, self.hnorm = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.eh_proj = _linear(hidden, 2 * hidden)
        self.layer = Layer(config, config.mtp_layer)
        self.norm = nn.Parameter(torch.ones(hidden))

    def forward(self, hidden: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """Return [B, L, H] behind the module's norm."""
        pair = torch.cat([rms_norm(embedded, self.enorm, self.eps), rms_norm(hidden, self.hnorm, self.eps)], -1)
        return rms_norm(self.layer(F.linear(pair, self.eh_proj), context), self.norm, self.eps)
