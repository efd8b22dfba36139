"""What one launch of a plan moves and computes, counted from its shapes: what operators' `cost` modules say.

Pure arithmetic: no torch, no Triton, no file. What shapes do not say (how much of the context is filled, how tokens
choose experts) is a `Load`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from seekforge.plugins.kernels.launch_plan import Launch, library_form
from seekforge.plugins.operator import TRITON, load
from seekforge.plugins.registry import KERNEL_FORMS


@dataclass(frozen=True, kw_only=True)
class Load:
    """What decides the work of a step beside the shapes of its tensors.

    Attributes:
        context: keys that the last query of each sequence sees, itself included.
        num_experts: routed experts of the model, on all ranks; tokens choose among them evenly and independently.
    """

    context: int
    num_experts: int = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch does, all its programs together.

    Attributes:
        read_bytes: different bytes that it reads, each once.
        written_bytes: bytes that it writes.
        loaded_bytes: bytes that its programs ask for, as often as they do: what L2 gives.
        flops: those of its matrix products that the operator asks for, 2 per multiply and add.
        pass_flops: those of the tiles that one program multiplies in one pass of its main loop, padding included.
        products: element type of the factors; None without products.
        programs: programs that have work; the others of the grid end at once.
        passes: how often the program with most work runs each of the kernel's loops, in the order of its code.
    """

    read_bytes: int
    written_bytes: int
    loaded_bytes: int
    programs: int
    flops: int = 0
    pass_flops: int = 0
    products: Literal["fp8", "f16", "bf16"] | None = None
    passes: tuple[int, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Bytes between the GPU's memory and its chip, where nothing lies in L2 before and nothing is read twice."""
        return self.read_bytes + self.written_bytes


class OpCost(Protocol):
    """What an operator's `cost` module gives."""

    def work(self, launch: Launch, bound: Mapping[str, Any], sm: int, load: Load) -> Work:
        """Return what one launch of the operator's plan does.

        Args:
            launch: one of `OpKernels.plan(bound, sm)`.
            bound: sizes and attributes of the call.
            sm: compute capability.
            load: what else decides.
        """
        ...


@functools.cache
def op_cost(op: str, provider: str = TRITON) -> OpCost:
    """Return the `cost` module of an operator that has kernels, by its ONNX op_type and their provider."""
    return load((library_form(op, provider) or KERNEL_FORMS[op]).cost)


def visible_keys(load: Load, queries: int) -> list[int]:
    """Return how many keys each query of a sequence sees, the last one all of the context; at least one."""
    return [max(1, load.context - queries + 1 + i) for i in range(queries)]


def experts_hit(num_experts: int, per_token: int, num_tokens: float) -> float:
    """Return how many experts a step of `num_tokens` reads, if tokens choose evenly and independently."""
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** num_tokens)
