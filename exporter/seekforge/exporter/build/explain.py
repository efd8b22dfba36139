"""Say in plain words where in the model a node is: compilers report names, people know layers and operators."""

from __future__ import annotations

import re
from typing import Final

#: Part of a node's name -> what it is.
_PARTS: Final[dict[str, str]] = {
    "self_attn.qkv_a_proj": "the joint projection to query and key latents",
    "self_attn.q_a_layernorm": "the norm of the query latent",
    "self_attn.q_b_proj": "the projection from the query latent to heads",
    "self_attn.kv_a_layernorm": "the norm of the key latent",
    "self_attn.o_proj": "the output projection of the attention",
    "self_attn.indexer.wq_b": "the indexer's query projection",
    "self_attn.indexer.k_norm": "the norm of the indexer's keys",
    "self_attn.indexer.weights_proj": "the indexer's head weights",
    "self_attn": "the attention",
    "input_layernorm": "the norm before the attention",
    "post_attention_layernorm": "the norm before the MLP",
    "mlp.gate_up_proj": "the dense MLP's gate and up projection",
    "mlp.down_proj": "the dense MLP's down projection",
    "mlp.gate": "the router",
    "mlp.experts": "the routed experts",
    "mlp.shared_experts.gate_up_proj": "the shared expert's gate and up projection",
    "mlp.shared_experts.down_proj": "the shared expert's down projection",
}
_ENDS: Final[dict[str, str]] = {
    "embed_tokens": "the embedding",
    "lm_head": "the head",
    "head": "the results behind the last layer",
    "norm": "the final norm",
    "rope_cos": "the rotary tables",
    "rope_sin": "the rotary tables",
    "step": "what all layers share (shapes and positions)",
}
_NAME = re.compile(rf"\b(?:layers\.\d+(?:\.[A-Za-z_]\w*)*|{'|'.join(_ENDS)})/[A-Z]\w*")


def place(name: str) -> str | None:
    """Return what a node's name means, or None when it is no name of ours.

    `layers.3.self_attn.o_proj/BlockFp8Linear` is layer 3, the output projection of the attention (operator
    BlockFp8Linear).
    """
    module, slash, operator = name.partition("/")
    if not slash:
        return None
    operator = re.sub(r"(?:_\d+)+$", "", operator)
    match = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", module)
    if match is None:
        return f"{_ENDS[module]} (operator {operator})" if module in _ENDS else None
    part = match[2]
    inside = "" if part is None else f", {_PARTS.get(part, part)}"
    return f"layer {match[1]}{inside} (operator {operator})"


def explain(messages: list[str]) -> str:
    """Return one sentence from a compiler's messages: where, then what it said first.

    Args:
        messages: errors in the order in which they came, not empty.
    """
    text = " ".join(messages[0].split())
    for message in messages:
        for match in _NAME.finditer(message):
            found = place(match[0])
            if found is not None:
                return f"{found}: {text}"
    return text
