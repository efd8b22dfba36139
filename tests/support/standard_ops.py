"""Standard ONNX operators of a program in torch, on whatever device their tensors are. For the graph walker.

Shapes, axes and other small integers stay on the host as CPU tensors, so that nothing waits for a GPU and a whole step
can be captured in a CUDA graph. Semantics are those of opset 23, as far as programs use them; anything else raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from seekforge.common.dtypes import FROM_ONNX
from seekforge.common.errors import ProgramError
from seekforge.plugins.torch_ops import TORCH_DTYPES

Attrs = Mapping[str, Any]
Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def run_standard(op: str, inputs: Sequence[Tensor | None], attrs: Attrs) -> tuple[Tensor, ...]:
    """Return the outputs of one node.

    Args:
        op: op_type of the ONNX domain.
        inputs: its inputs in order; None where an optional one is left out.
        attrs: its attributes by name, strings decoded.

    Raises:
        ProgramError: the operator is not known here.
    """
    function = OPERATORS.get(op)
    if function is None:
        raise ProgramError(f"graph walker: no standard operator {op}; it knows {', '.join(OPERATORS)}")
    result = function(*inputs, **attrs)
    return result if isinstance(result, tuple) else (result,)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as plain values."""
    values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _ints(values: Tensor | None) -> list[int]:
    """Integers of a host tensor; a device tensor here would make the step wait for the GPU."""
    assert values is not None and values.device.type == "cpu", "shapes and axes are host values"
    return [int(value) for value in values.reshape(-1).tolist()]


def _cast(x: Tensor, *, to: int, **_: Any) -> Tensor:
    return x.to(TORCH_DTYPES[FROM_ONNX[to]])


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bounds = [
        None if one is None else _ints(one)[0] if not one.is_floating_point() else one.item() for one in (low, high)
    ]
    return torch.clamp(x, *bounds)


def _gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    rows = x.index_select(axis, index.reshape(-1).long())
    return rows.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    assert stash_type == 1 and axis in (-1, x.dim() - 1)
    return F.layer_norm(x, (x.shape[-1],), scale, bias, epsilon)


def _rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    assert stash_type == 1 and axis in (-1, x.dim() - 1)
    return F.rms_norm(x, (x.shape[-1],), scale, epsilon)


def _rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, rotary_embedding_dim: int, interleaved: int = 0
) -> Tensor:
    """[B, Q, num_heads · D], cos and sin [B, Q, R / 2]; written out, not torch's function that made the node."""
    heads = x.unflatten(-1, (num_heads, -1))
    turning, still = heads[..., :rotary_embedding_dim], heads[..., rotary_embedding_dim:]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        u, v = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1).flatten(-2)
    else:
        u, v = turning.chunk(2, dim=-1)
        turned = torch.cat([u * cos - v * sin, u * sin + v * cos], dim=-1)
    return torch.cat([turned, still], dim=-1).flatten(2)


def _reduce_sum(x: Tensor, axes: Tensor, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    assert not noop_with_empty_axes
    return x.sum(_ints(axes), keepdim=bool(keepdims))


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(_ints(shape))]
    return x.reshape(sizes)


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    where = list(range(len(first))) if axes is None else _ints(axes)
    by = [1] * len(first) if steps is None else _ints(steps)
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(where, first, last, by, strict=True):
        assert step > 0, "programs slice forwards"
        index[axis % x.dim()] = slice(start, end, step)
    return x[tuple(index)]


def _split(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // num_outputs), axis)
    return torch.split(x, _ints(sizes), axis)


def _squeeze(x: Tensor, axes: Tensor) -> Tensor:
    numbers = _ints(axes)
    assert all(x.shape[axis] == 1 for axis in numbers)
    return x.squeeze(tuple(numbers))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    numbers = _ints(axes)
    for axis in sorted(axis % (x.dim() + len(numbers)) for axis in numbers):
        x = x.unsqueeze(axis)
    return x


def _top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, ...]:
    top = torch.topk(x, _ints(k)[0], dim=axis, largest=bool(largest), sorted=bool(sorted))
    return top.values, top.indices


#: op_type -> function of its inputs in order and its attributes by name.
OPERATORS: Final[dict[str, Operator]] = {
    "Add": torch.add,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Exp": torch.exp,
    "Gather": _gather,
    "LayerNormalization": _layer_norm,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "TopK": _top_k,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}
