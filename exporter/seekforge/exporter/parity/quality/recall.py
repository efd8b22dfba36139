"""How much of the attention lies where the indexer looks: the mass that dense attention would put on the chosen keys.

Dense attention is PyTorch's, in FP32, on the hidden states of the sparse model; of each query its heads' probabilities
over all visible keys are averaged. The best that any choice of `index_topk` keys could hold is the mass of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from seekforge.common.records import Record
from seekforge.exporter.models.shared.end_operations import Tables, TokenEmbedding
from seekforge.exporter.models.shared.layer_operations import NEXT, LayerModule
from seekforge.exporter.models.shared.settings import Settings
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import EXACT
from seekforge.formats.paged_cache import blocks_needed
from seekforge.formats.step_io import lay_out
from seekforge.formats.weight_recipes import TensorSource

#: Row -> layer -> keys [tokens, index_topk] int32 that were chosen; −1 is none.
Choices = Mapping[int, Mapping[int, np.ndarray]]
#: Queries at a time: bounds the probabilities of all heads.
_QUERIES = 128


class Recall(Record):
    """Mass of attention inside a choice of keys, mean over queries that see more than `index_topk` of them.

    Attributes:
        inside: the mass of the keys that were chosen.
        best: the mass of as many keys as hold the most.
        layers: layer -> inside.
        num_queries: queries of one layer.
    """

    inside: float
    best: float
    layers: dict[str, float]
    num_queries: int


@torch.inference_mode()
def measure_recall(
    config: ModelConfig,
    source: TensorSource,
    sequences: Mapping[int, Sequence[int]],
    choices: Mapping[str, Choices],
    *,
    reference: str,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Recall]:
    """Measure choices of several sides.

    Args:
        config: the model's configuration; its family chooses keys.
        source: the checkpoint.
        sequences: row -> its tokens.
        choices: side -> what it chose; a layer or row that it does not show is left out of it.
        reference: what the PyTorch model's own choice is called in the result.
        say: told each layer.

    Returns:
        Side -> its recall; without those of which no query sees more than `index_topk` keys.
    """
    settings = Settings(config, EXACT)
    topk = config.index_topk or 0
    tables, embedding = Tables(settings, source), TokenEmbedding(settings, source)
    sums: dict[str, dict[int, list[float]]] = {name: {} for name in (reference, *choices)}
    steps, carried = {}, {}
    for row, ids in sequences.items():
        blocks = blocks_needed(len(ids))
        inputs = lay_out([ids], [0], [range(1, 1 + blocks)])
        arrays = (inputs.positions, inputs.slot_mapping, inputs.block_table)
        steps[row] = blocks, tables.step(*map(torch.from_numpy, arrays))
        carried[row] = {"hidden_states": embedding.run(torch.from_numpy(inputs.input_ids))}
    for layer in range(config.num_hidden_layers):
        say(f"attention of layer {layer}")
        module = LayerModule(settings, layer, source)
        for row, (blocks, step) in steps.items():
            values: dict[str, Tensor] = dict(carried[row])
            state = module.new_state(1 + blocks)
            state.step = step
            for op in module.before_cache(state):
                values[op.output] = op.run(values)
            module.write_cache(state, values)
            for op in module.behind_cache(state):
                values[op.output] = op.run(values)
            carried[row] = {NEXT[name]: values[name] for name in NEXT}
            cached = state.caches["latent_cache"][step.slot_mapping[0]]
            sides = {reference: values["topk_indices"][0]}
            for name, chosen in choices.items():
                if layer in chosen.get(row, {}):
                    sides[name] = torch.from_numpy(np.asarray(chosen[row][layer]))
            for name, (inside, best, count) in _masses(values, cached, sides, config, topk).items():
                total = sums[name].setdefault(layer, [0.0, 0.0, 0])
                for i, value in enumerate((inside, best, count)):
                    total[i] += value
    return {name: _recall(layers) for name, layers in sums.items() if any(total[2] for total in layers.values())}


def _masses(
    values: Mapping[str, Tensor], cached: Tensor, sides: Mapping[str, Tensor], config: ModelConfig, topk: int
) -> dict[str, tuple[float, float, int]]:
    """Return side -> (sum of the mass inside, sum of the best, number of queries) of one row in one layer."""
    c, k_pe = cached.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    length = len(cached)
    sums = {name: [0.0, 0.0, 0] for name in sides}
    for start in range(topk, length, _QUERIES):
        rows = slice(start, min(start + _QUERIES, length))
        q, q_pe = (values[name][0, rows].transpose(0, 1) for name in ("q_latent", "q_pe"))
        scores = (q @ c.T + q_pe @ k_pe.T) * config.softmax_scale  # [heads, queries, keys]
        later = torch.arange(length) > torch.arange(rows.start, rows.stop)[:, None]
        mass = torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1).mean(0)
        best = float(mass.topk(topk, dim=-1).values.sum())
        for name, chosen in sides.items():
            keys = chosen[rows].long()
            held = mass.gather(1, keys.clamp(0, length - 1)).masked_fill((keys < 0) | (keys >= length), 0.0)
            for i, value in enumerate((float(held.sum()), best, len(keys))):
                sums[name][i] += value
    return {name: (inside, best, int(count)) for name, (inside, best, count) in sums.items()}


def _recall(layers: Mapping[int, Sequence[float]]) -> Recall:
    inside, best, count = (sum(total[i] for total in layers.values()) for i in range(3))
    return Recall(
        inside=inside / count,
        best=best / count,
        layers={str(layer): total[0] / total[2] for layer, total in layers.items() if total[2]},
        num_queries=int(count) // len(layers),
    )
