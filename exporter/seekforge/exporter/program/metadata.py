"""What a graph file says of itself, for viewers such as Netron: producer, descriptions, properties.

Nothing of it is read by seekforge (program.json and manifest.json are what counts), and nothing names a machine, a path
or a time: the same model gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx

from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.parallelism import Parallelism
from seekforge.plugins.operator import DOMAIN

PRODUCER: Final = "seekforge"

#: Input or output, without the number of its layer -> what it is.
_TENSORS: Final[dict[str, str]] = {
    "input_ids": "tokens of a step, one row per sequence, padded on the right",
    "positions": "position of each token in its sequence; −1 pads",
    "slot_mapping": "where each token is written in the paged caches: block · 64 + offset; −1 writes nowhere",
    "block_table": "block of the caches that holds each 64 positions of a sequence",
    "logits_index": "which rows of the step get logits",
    "hidden_in": "hidden states that the previous step or graph gave",
    "hidden_states": "hidden states between layers",
    "residual": "the residual stream between layers",
    "latent_cache": "paged cache of a layer: compressed keys and values of MLA, and the rotary key; read and written",
    "latent_cache_out": "the same buffer as latent_cache, after the step",
    "index_cache": "paged cache of a layer: keys of the indexer; read and written",
    "index_cache_out": "the same buffer as index_cache, after the step",
    "rope_cos": "table of RoPE, a row per position",
    "rope_sin": "table of RoPE, a row per position",
    "hadamard": "the rotation in front of the indexer's quantization",
    "expert_map": "which experts this rank has",
    "vocab_start": "the first token of this rank's part of the vocabulary",
    "hidden": "hidden states behind the last norm: what the draft (MTP) layer takes",
    "top_logits": "the best logits of each row, in descending order",
    "top_ids": "tokens that have those logits",
    "logsumexp": "of all logits of each row: log p of a token is its logit minus this",
    "logits": "scores of the next token, a row for each entry of logits_index",
    "topk_indices": "positions that the indexer chose in a layer, ascending, then −1",
    "expert_ids": "experts that the router chose in a layer",
}


def annotate(
    model: onnx.ModelProto,
    graph: str,
    *,
    version: str,
    config: ModelConfig,
    numerics: str,
    layer_range: tuple[int, int],
    parallelism: Parallelism,
) -> None:
    """Describe the graph `graph` ("model" or "mtp") of a program. What stood there before is replaced.

    Args:
        version: the version of seekforge.
        config: the model.
        numerics: name of the numerics.
        layer_range: [a, b), layers of the main model.
        parallelism: how ranks share the model.
    """
    first, last = layer_range[0], layer_range[1] - 1
    what = f"layers {first} to {last} of {config.num_hidden_layers}" if graph == "model" else "the draft (MTP) layer"
    custom = sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN})
    _describe(
        model,
        version,
        f"{config.model_type}, {what}: one step over paged caches, for prefill and decode alike. Weights are inputs; "
        "bindings.json beside this file says how each is made from the checkpoint. Operators of the domain "
        f"'{DOMAIN}' have their meaning as functions of this file: open one to see it.",
        {
            "form": "canonical program",
            "graph": graph,
            "model_type": config.model_type,
            "layers": f"{first}-{last} of {config.num_hidden_layers}" if graph == "model" else "mtp",
            "hidden_size": str(config.hidden_size),
            "num_attention_heads": str(config.num_attention_heads),
            "n_routed_experts": str(config.n_routed_experts),
            "num_experts_per_tok": str(config.num_experts_per_tok),
            "index_topk": str(config.index_topk),
            "numerics": numerics,
            "tp": str(parallelism.tp),
            "pp": str(parallelism.pp),
            "ep": str(parallelism.ep_size),
            "custom_operators": ", ".join(custom),
        },
    )
    for value in (*model.graph.input, *model.graph.output):
        head, _, rest = value.name.partition(".")
        value.doc_string = _TENSORS.get(head if rest.isdigit() or not rest else "", "")


def annotate_again(model: onnx.ModelProto, description: str, properties: Mapping[str, str]) -> None:
    """Say what a graph made from a program's graph is; properties that are not named stay."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    _describe(model, model.producer_version, description, kept | dict(properties))


def _describe(model: onnx.ModelProto, version: str, description: str, properties: Mapping[str, str]) -> None:
    model.producer_name, model.producer_version, model.domain = PRODUCER, version, DOMAIN
    model.doc_string = model.graph.doc_string = description
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(properties.items())))
