"""Register an operator with torch from its spec: eager calls the reference, fake tensors get shapes only.

Operators are functional: an output that aliases an input in the engine is a new tensor here, because a
mutable custom operator does not survive torch.export -> ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from seekforge.common.dtypes import TORCH
from seekforge.plugins.operator import DOMAIN, OpSpec

#: our name -> torch.dtype; a torch that is older than a type lacks it.
TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, word) for name, word in TORCH.items() if hasattr(torch, word)
}
DTYPE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def register(spec: OpSpec, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Define `torch.ops.seekforge.<name>` and return it.

    The eager implementation checks shapes, dtypes and attributes against the spec, then calls `reference`
    with the tensors and attributes in order. Calling this twice for one op is a bug of ours and raises.

    Args:
        spec: the contract.
        reference: plain torch; takes inputs then attributes, returns one tensor or a tuple.
    """
    qualified = f"{DOMAIN}::{spec.torch_name}"
    torch.library.define(qualified, spec.torch_schema())

    def split(args: tuple[Any, ...]) -> tuple[list[tuple[int, ...]], list[str], dict[str, Any]]:
        tensors, values = args[: len(spec.inputs)], args[len(spec.inputs) :]
        attrs = {attr.name: value for attr, value in zip(spec.attrs, values, strict=True)}
        spec.check_attrs(attrs)
        names = {arg.name: DTYPE_NAMES.get(t.dtype, str(t.dtype)) for arg, t in zip(spec.inputs, tensors, strict=True)}
        bound = spec.bind([tuple(t.shape) for t in tensors], attrs)
        return spec.output_shapes(bound), spec.output_dtypes(names), attrs

    @torch.library.impl(qualified, "CompositeExplicitAutograd")
    def eager(*args: Any) -> Any:
        split(args)
        return reference(*args)

    @torch.library.register_fake(qualified)
    def fake(*args: Any) -> Any:
        shapes, dtypes, _ = split(args)
        like: Tensor = args[0]
        results = tuple(
            like.new_empty(shape, dtype=TORCH_DTYPES[dtype]) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return results[0] if len(results) == 1 else results

    return getattr(getattr(torch.ops, DOMAIN), spec.torch_name)
