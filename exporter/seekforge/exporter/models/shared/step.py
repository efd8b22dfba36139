"""What a layer is told of a step beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
        topk_indices: [B, Q, index_topk] int32, the keys that the last layer before this one chose; None where it is not
            told, since it chooses itself.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    cos: Tensor
    sin: Tensor
    hadamard: Tensor | None
    expert_map: Tensor | None = None
    topk_indices: Tensor | None = None
