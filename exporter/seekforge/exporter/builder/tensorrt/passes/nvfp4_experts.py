"""Experts in NVFP4: their weights, FP8 in a program and a checkpoint, become rows of 4-bit codes and scales.

The node stays `MoeExperts`, which knows such weights by the width of their rows. The codes are made when weights are
loaded, from the FP8 values and by themselves: no other tensor of the checkpoint is read for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto

from seekforge.formats.quantization.nvfp4 import row_bytes
from seekforge.formats.weight_recipes import Recipe, nvfp4_rows, nvfp4_scales
from seekforge.plugins.moe_experts.spec import SPEC
from seekforge.plugins.operator import DOMAIN

_WEIGHTS = tuple(arg.name for arg in SPEC.inputs if arg.dtype == "fp8")


def expert_weights(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield each FP8 weight of experts that a graph reads, and its scales: names of inputs."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == SPEC.name:
            inputs = dict(zip((arg.name for arg in SPEC.inputs), node.input, strict=True))
            for name in _WEIGHTS:
                yield inputs[name], inputs[f"{name}_scale"]


def use_nvfp4(model: onnx.ModelProto) -> None:
    """Make the experts' weights of a graph inputs of NVFP4 rows, int8; changed in place."""
    weights = {weight for weight, _ in expert_weights(model)}
    for value in model.graph.input:
        if value.name in weights:
            tensor = value.type.tensor_type
            tensor.elem_type = TensorProto.INT8
            tensor.shape.dim[-1].dim_value = row_bytes(tensor.shape.dim[-1].dim_value)


def nvfp4_recipes(model: onnx.ModelProto, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Return the recipes of the experts' weights and scales of a graph in NVFP4, of those of the program."""
    made: dict[str, Recipe] = {}
    for weight, scale in expert_weights(model):
        made |= {weight: nvfp4_rows(recipes[weight]), scale: nvfp4_scales(recipes[scale])}
    return made
