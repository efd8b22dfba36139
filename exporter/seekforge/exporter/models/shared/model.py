"""The step programs: a range of layers of the main model, and the MTP module. A family has subclasses with its layer.

A range [a, b) that starts at 0 takes `input_ids`, any other takes `hidden_states` and `residual` [B, Q, H]:
two tensors, since the norm sees their unrounded sum. The range that ends at the last layer gives results, any
other gives that pair. Where layers share an earlier layer's choice of keys, it is handed over too. Pipeline stages,
truncated models and layer checks are all this one thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.coded import CodedLinear, use_codes
from seekforge.exporter.models.shared.latent_attention import LatentAttention
from seekforge.exporter.models.shared.layers import (
    Embedding,
    LinearF32,
    Mlp,
    RmsNorm,
    SumRanks,
    all_logits,
    product,
    weight,
)
from seekforge.exporter.models.shared.moe import Moe
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.step import Step
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.formats.step_io import INTERMEDIATE_TENSORS, RESULTS, TOPK_INDICES, TOPK_INDICES_IN, TOPK_INDICES_OUT


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind an add-and-norm."""

    #: What attends: a family's own `LatentAttention`.
    attention: ClassVar[type[LatentAttention]]

    def __init__(self, settings: Settings, layer: int) -> None:
        super().__init__()
        config = settings.config
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, settings.dtype)
        self.self_attn = self.attention(settings, layer)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, settings.dtype)
        dense = Mlp(settings, settings.rank.intermediate_size)
        self.mlp = Moe(settings) if config.is_moe_layer(layer) else dense
        self.sum_ranks = SumRanks(settings.parallelism.tp)

    def forward(
        self, x: Tensor, residual: Tensor | None, step: Step, caches: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """Return (x, residual, the layer's caches, what its attention chose, expert_ids or None)."""
        if residual is None:
            a, residual = self.input_layernorm(x), x
        else:
            a, residual = self.input_layernorm.add(x, residual)
        x, written, chosen = self.self_attn(a, step, *caches)
        a, residual = self.post_attention_layernorm.add(x, residual)
        if isinstance(self.mlp, Moe):
            x, expert_ids = self.mlp(a, step.expert_map)
        else:
            x, expert_ids = self.sum_ranks(self.mlp(a)), None
        return x, residual, written, chosen, expert_ids


class _StepModule(nn.Module):
    """What both programs share: tables, layers, caches, and results from the last hidden state."""

    #: What a layer is, and the selections that its attention gives beside its output: a family's own.
    layer: ClassVar[type[DecoderLayer]]
    selections: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Settings, layers: Sequence[int]) -> None:
        super().__init__()
        config = settings.config
        self.settings, self.layer_numbers = settings, layers
        half = config.qk_rope_head_dim // 2
        self.rope_cos = weight(config.max_position_embeddings, half, dtype=torch.float32)
        self.rope_sin = weight(config.max_position_embeddings, half, dtype=torch.float32)
        size = config.index_head_dim
        rotates = settings.numerics.hadamard and size > 0
        self.hadamard = weight(size, size, dtype=torch.float32) if rotates else None
        is_dealt = settings.parallelism.ep_size > 1 and any(config.is_moe_layer(i) for i in layers)
        self.expert_map = weight(config.n_routed_experts, dtype=torch.int32) if is_dealt else None
        self.layers = nn.ModuleDict({str(i): self.layer(settings, i) for i in layers})
        #: The first token of the rank's part of the vocabulary; None where that is not divided, or not met here.
        self.vocab_start: nn.Parameter | None = None

    def make_step(self, positions: Tensor, slot_mapping: Tensor, block_table: Tensor) -> Step:
        """Look up what all layers of one step share.

        Args:
            positions: [B, Q] int64; −1 pads.
            slot_mapping: [B, Q] int64; −1 pads.
            block_table: [B, MB] int32.
        """
        row = positions.clamp_min(0)  # a padded row has position −1
        cos, sin = F.embedding(row, self.rope_cos), F.embedding(row, self.rope_sin)
        return Step(positions, slot_mapping, block_table, cos, sin, self.hadamard, self.expert_map)

    def _run_layers(
        self, x: Tensor, residual: Tensor | None, step: Step, caches: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Step]:
        """Return (x, residual, caches in the order of `cache_names`, taps in the order of `tap_names`, step).

        The step is as the layer behind these is told of it.
        """
        written, chosen, experts = [], [], []
        left = dict(zip(self.cache_kinds(), map(iter, caches), strict=True))
        for number, layer in zip(self.layer_numbers, self.layers.values(), strict=True):
            of_layer = [next(left[kind]) for kind in self._caches_of(number)]
            x, residual, layer_caches, selections, expert_ids = layer(x, residual, step, of_layer)
            written += layer_caches
            chosen += selections
            if TOPK_INDICES in self.selections and selections:
                step = replace(step, topk_indices=selections[self.selections.index(TOPK_INDICES)])
            if expert_ids is not None:
                experts.append(expert_ids)
        assert residual is not None
        return x, residual, tuple(written), (*chosen, *experts), step

    def logits(self, hidden: Tensor, logits_index: Tensor) -> Tensor:
        """Return [N, V] f32, the logits of the rows `logits_index` [N] of the flattened [B, Q, H]."""
        assert isinstance(self.lm_head, LinearF32 | CodedLinear)
        logits = self.lm_head(hidden.flatten(0, 1).index_select(0, logits_index))
        return logits if self.vocab_start is None else all_logits(logits, self.vocab_start, self.settings)

    def _add_vocabulary(self) -> None:
        """Add what says which part of the vocabulary this rank has, behind the modules that have one."""
        settings = self.settings
        if settings.parallelism.divides_vocabulary(settings.config):
            self.vocab_start = weight(1, dtype=torch.int32)

    def _results(self, hidden: Tensor, logits_index: Tensor) -> tuple[Tensor, ...]:
        """Return top_logits, top_ids, logsumexp, logits of the rows `logits_index` of [B·Q, H]."""
        logits = self.logits(hidden, logits_index)
        # topk, not a stable sort: it exports as one TopK, whose tie rule in ONNX Runtime is the lowest id
        top = torch.topk(logits, self.settings.config.num_top_logits, dim=-1)
        peak = top.values[:, :1]
        logsumexp = (peak + torch.log(torch.exp(logits - peak).sum(-1, keepdim=True))).squeeze(-1)
        return top.values, top.indices.to(torch.int32), logsumexp, logits

    def token_embedding(self) -> nn.Module:
        """Return the module that looks tokens up, of a program that takes tokens."""
        assert isinstance(self.embed_tokens, nn.Module)
        return self.embed_tokens

    def cache_names(self) -> list[str]:
        """Names of the cache inputs, in order; the output of each is its name with `_out` before the number."""
        return [f"{kind}.{layer}" for layer in self.layer_numbers for kind in self._caches_of(layer)]

    def cache_kinds(self) -> list[str]:
        """Kinds of caches that these layers have, in the order in which `forward` takes them."""
        return list(dict.fromkeys(kind for layer in self.layer_numbers for kind in self._caches_of(layer)))

    def layers_with(self, kind: str) -> dict[int, int]:
        """Return the layers that have a cache of a kind -> values that one token has in it."""
        widths = {layer: self._caches_of(layer) for layer in self.layer_numbers}
        return {layer: of_layer[kind] for layer, of_layer in widths.items() if kind in of_layer}

    def _caches_of(self, layer: int) -> dict[str, int]:
        return family_of(self.settings.config).caches(self.settings.config, layer)

    def tap_names(self) -> list[str]:
        """Names of the optional outputs that show what was chosen."""
        config = self.settings.config
        choosing = [i for i in self.layer_numbers if not config.shares_indices(i)]
        moe = [i for i in self.layer_numbers if config.is_moe_layer(i)]
        return [f"{kind}.{i}" for i in choosing for kind in self.selections] + [f"expert_ids.{i}" for i in moe]

    def new_caches(self, num_blocks: int) -> dict[str, Tensor]:
        """Return zeroed caches of `num_blocks` blocks, by name in the order of `cache_names`."""
        slots, dtype = num_blocks * BLOCK_SIZE, self.settings.cache_dtype
        return {
            f"{kind}.{layer}": torch.zeros(slots, width, dtype=dtype)
            for layer in self.layer_numbers
            for kind, width in self._caches_of(layer).items()
        }


class StepModel(_StepModule):
    """Layers [start, stop) of the main model."""

    def __init__(
        self, settings: Settings, layer_range: tuple[int, int], *, layers: Sequence[int] | None = None
    ) -> None:
        """Make the module.

        Args:
            settings: how it computes.
            layer_range: [start, stop); decides about embedding, head, inputs and results.
            layers: the layers of the range that are there, for a trace that stands for all of them; None: all.
        """
        config = settings.config
        start, stop = layer_range
        assert 0 <= start < stop <= config.num_hidden_layers, layer_range
        super().__init__(settings, range(start, stop) if layers is None else layers)
        self.is_first, self.is_last = start == 0, stop == config.num_hidden_layers
        self.takes_indices, self.gives_indices = config.shares_indices(start), config.shares_indices(stop)
        if self.is_first:
            self.embed_tokens = Embedding(settings)
        if self.is_last:
            self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, settings.dtype)
            self.lm_head = LinearF32(config.hidden_size, settings.rank.vocab_size, settings.dtype)
        if self.is_first or self.is_last:
            self._add_vocabulary()
        use_codes(self, settings)

    def token_names(self) -> tuple[str, ...]:
        """Names of the inputs that carry the tokens."""
        if self.is_first:
            return ("input_ids",)
        return (*INTERMEDIATE_TENSORS, TOPK_INDICES_IN) if self.takes_indices else INTERMEDIATE_TENSORS

    def result_names(self) -> tuple[str, ...]:
        """Names of the result outputs."""
        if self.is_last:
            return RESULTS
        return (*INTERMEDIATE_TENSORS, TOPK_INDICES_OUT) if self.gives_indices else INTERMEDIATE_TENSORS

    def forward(
        self,
        tokens: tuple[Tensor, ...],
        positions: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        logits_index: Tensor | None,
        caches: list[list[Tensor]],
    ) -> tuple[Tensor, ...]:
        """Run one step.

        Args:
            tokens: (input_ids [B, Q] int64,), or (hidden_states, residual) [B, Q, H] and, where the first layer shares
                an earlier choice, topk_indices [B, Q, index_topk] int32.
            positions, slot_mapping: [B, Q] int64; −1 pads. block_table: [B, MB] int32.
            logits_index: [N] int64, rows of the flattened B·Q that get logits; None unless the range is last.
            caches: one [NB·64, width] per layer that has it, for each kind of cache (`cache_kinds`).

        Returns:
            Outputs named by `result_names`, then caches, then `tap_names`.
        """
        step = self.make_step(positions, slot_mapping, block_table)
        if self.is_first:
            x, residual = self.embed_tokens(tokens[0], self.vocab_start), None
        else:
            x, residual, *shared = tokens
            step = replace(step, topk_indices=shared[0] if shared else None)
        x, residual, written, taps, step = self._run_layers(x, residual, step, caches)
        if not self.is_last:
            # a copy: the same values may be an input or a tap
            handed = (step.topk_indices.clone(),) if self.gives_indices and step.topk_indices is not None else ()
            return (x, residual, *handed, *written, *taps)
        assert logits_index is not None
        hidden, _ = self.norm.add(x, residual)
        return (hidden, *self._results(hidden, logits_index), *written, *taps)


class MtpModel(_StepModule):
    """The multi-token-prediction module: predicts t_{i+2} from h_i and t_{i+1} (spec §6)."""

    def __init__(self, settings: Settings, *, layers: Sequence[int] | None = None) -> None:
        """Make the module.

        Args:
            settings: how it computes.
            layers: none of its one layer, for what lies around that alone; None: the layer.
        """
        config = settings.config
        assert config.mtp_layer is not None
        super().__init__(settings, range(config.mtp_layer, config.mtp_layer + 1) if layers is None else layers)
        self.embed_tokens = Embedding(settings)
        self.enorm = RmsNorm(config.hidden_size, config.rms_norm_eps, settings.dtype)
        self.hnorm = RmsNorm(config.hidden_size, config.rms_norm_eps, settings.dtype)
        self.eh_proj = weight(config.hidden_size, 2 * config.hidden_size, dtype=settings.dtype)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, settings.dtype)
        self.lm_head = LinearF32(config.hidden_size, settings.rank.vocab_size, settings.dtype)
        self._add_vocabulary()
        use_codes(self, settings)

    def token_names(self) -> tuple[str, ...]:
        """Names of the inputs that carry the tokens."""
        return ("input_ids", "hidden_in")

    def result_names(self) -> tuple[str, ...]:
        """Names of the result outputs; `hidden` is what a further draft is fed (post shared_head.norm)."""
        return RESULTS

    def forward(
        self,
        tokens: tuple[Tensor, ...],
        positions: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        logits_index: Tensor,
        caches: list[list[Tensor]],
    ) -> tuple[Tensor, ...]:
        """Run one step; as `StepModel.forward` with tokens = (input_ids t_{i+1}, hidden_in h_i [B, Q, H])."""
        input_ids, hidden_in = tokens
        step = self.make_step(positions, slot_mapping, block_table)
        x, residual, written, taps, _ = self._run_layers(self.combine(input_ids, hidden_in), None, step, caches)
        hidden, _ = self.norm.add(x, residual)
        return (hidden, *self._results(hidden, logits_index), *written, *taps)

    def combine(self, input_ids: Tensor, hidden_in: Tensor) -> Tensor:
        """Return what goes into the layer, [B, Q, H], of input_ids t_{i+1} [B, Q] and hidden_in h_i [B, Q, H]."""
        # embedding first, hidden second: the paper writes it the other way round, the weights do not (spec §6)
        pair = torch.cat([self.enorm(self.embed_tokens(input_ids, self.vocab_start)), self.hnorm(hidden_in)], dim=-1)
        return product(pair, self.eh_proj.T)
