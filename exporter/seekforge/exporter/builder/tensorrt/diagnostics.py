"""Say in plain words where in the model a node is: compilers report names, people know layers and operators."""

from __future__ import annotations

import re
from collections.abc import Iterable
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


#: What the compilers say when the scratch memory that they may use is too little. An allocation that fails at that
#: very size is TensorRT-RTX's way of saying it; a larger one is the machine's fault.
_TIGHT = re.compile(
    r"exceeding workspace limit|insufficient workspace|OutOfMemory \(Requested size was (?P<bytes>\d+) bytes"
)
_UNITS: Final = {"G": 1 << 30, "M": 1 << 20, "K": 1 << 10}


def place(name: str, alike: int = 0) -> str | None:
    """Return what a node's name means, or None when it is no name of ours.

    Args:
        name: of a node.
        alike: how many layers are compiled with this one.

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
    others = f" (and {alike} {'layer' if alike == 1 else 'layers'} like it)" if alike else ""
    return f"layer {match[1]}{others}{inside} (operator {operator})"


def explain(messages: list[str], alike: int = 0) -> str:
    """Return one sentence from a compiler's messages: where, then what it said first.

    Args:
        messages: errors in the order in which they came, not empty.
        alike: as `place` takes it.
    """
    text = " ".join(messages[0].split())
    found = _first_place(messages, alike)
    return text if found is None else f"{found}: {text}"


def too_tight(lines: Iterable[str], workspace_bytes: int, alike: int = 0) -> str | None:
    """Return what to do when the failure is that of a `--workspace` which is too small, or None when it is not.

    Args:
        lines: errors, then the log: where the compiler crashed, a warning in it is all that is left.
        workspace_bytes: that was asked for.
        alike: as `place` takes it.
    """
    said = [
        line
        for line in lines
        if (match := _TIGHT.search(line)) and (match["bytes"] is None or int(match["bytes"]) <= workspace_bytes)
    ]
    if not said:
        return None
    found = _first_place(said, alike)
    unit = next((unit for unit, size in _UNITS.items() if workspace_bytes % size == 0), "")
    size = f"{workspace_bytes // _UNITS.get(unit, 1)}{unit}"
    where = "" if found is None else f" for {found}"
    return f"--workspace {size} is too small{where}: pass more, or leave it out"


def _first_place(lines: Iterable[str], alike: int) -> str | None:
    names = (match[0] for line in lines for match in _NAME.finditer(line))
    return next((found for name in names if (found := place(name, alike)) is not None), None)
