"""Run an operator's launch plan on the CPU with Triton's interpreter. For tests; needs torch and triton.

The plan is the one that a GPU would get: same variants, grids, arguments and workspace. `TRITON_INTERPRET=1` must be in
the environment before triton is imported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from seekforge.common.dtypes import FROM_TRITON
from seekforge.common.errors import EnvironmentFault
from seekforge.plugins.kernels.launch_plan import WORKSPACE, Buffer, check_plan, op_kernels, statics_of
from seekforge.plugins.registry import SPECS
from seekforge.plugins.torch_ops import DTYPE_NAMES, TORCH_DTYPES

#: Triton pointer type -> dtype of the elements.
POINTERS: Final[dict[str, torch.dtype]] = {word: TORCH_DTYPES[name] for word, name in FROM_TRITON.items()}
#: What outputs and workspace hold before a kernel writes: NaN in every floating type, and no valid index.
POISON: Final = 0xFF


def interpret(op: str, inputs: Sequence[Tensor], attrs: Mapping[str, Any], *, sm: int) -> tuple[Tensor, ...]:
    """Return the outputs that the kernels of `sm` compute.

    Args:
        op: ONNX op_type.
        inputs: contiguous CPU tensors in the dtypes of a GPU target, in the order of the spec, optional ones behind.
        attrs: attribute values.
        sm: whose plan and variants.

    Raises:
        EnvironmentFault: the interpreter is off.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise EnvironmentFault("set TRITON_INTERPRET=1 before triton is imported")
    spec = SPECS[op]
    bound = spec.bind([tuple(t.shape) for t in inputs], attrs)
    tensors = {name: t.contiguous() for name, t in spec.named(inputs).items()}
    names = {name: DTYPE_NAMES[t.dtype] for name, t in tensors.items()}
    kernels = op_kernels(op)
    variants = kernels.variants(statics_of(op, bound), sm)
    plan = kernels.plan(bound, sm)
    check_plan(plan, variants)
    assert plan.workspace_bytes <= kernels.workspace_bytes(bound, sm)

    aliases = dict(spec.aliases)
    outputs = []
    for arg, shape, dtype in zip(spec.outputs, spec.output_shapes(bound), spec.output_dtypes(names), strict=True):
        if arg.name in aliases:
            tensor = tensors[aliases[arg.name]].clone()
        else:
            tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
            _bytes(tensor).fill_(POISON)
        tensors[arg.name] = tensor
        outputs.append(tensor)
    tensors[WORKSPACE] = torch.full((plan.workspace_bytes,), POISON, dtype=torch.uint8)

    by_name = {variant.name: variant for variant in variants}
    functions = importlib.import_module(f"seekforge.plugins.{spec.torch_name}.kernel")
    for launch in plan.launches:
        variant = by_name[launch.variant]
        arguments = {
            name: _bytes(tensors[value.name])[value.offset :].view(POINTERS[variant.types[name]])
            if isinstance(value, Buffer)
            else value
            for name, value in launch.arguments.items()
        }
        getattr(functions, variant.kernel)[launch.grid](**arguments, **variant.constants)
    return tuple(outputs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
