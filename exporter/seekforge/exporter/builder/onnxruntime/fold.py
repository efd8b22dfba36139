"""Fold weights into a specialized graph: weight inputs become initializers in one external file.

On a CPU this is where the speed is: FP8 weights are dequantized once, laid out as the product reads them
([K, N]), or turned into int8 or int4 codes (`quantize`), and every Cast or Transpose of a weight is done here instead
of at each load. Weights that two graphs share (embedding, head, tables) are stored once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from seekforge.common.dtypes import NUMPY, ONNX
from seekforge.common.errors import ProgramError
from seekforge.exporter.builder.onnxruntime.quantize import MS_DOMAIN, quantize_experts, quantize_linear
from seekforge.formats.engine.weight_file import WeightLayout, constant_bytes
from seekforge.formats.int_quant import Quantization
from seekforge.formats.weight_recipes import QuantizedOnce, Recipe, TensorSource, evaluate_into, transpose, wide_values
from seekforge.plugins.functions.attach import operator_of
from seekforge.plugins.operator import FoldedForm, OpSpec

#: Bytes written at a time where a file cannot be allocated.
_ZEROS = 1 << 22


def fold_weights(
    model: onnx.ModelProto, weights: Mapping[str, Recipe], how: Quantization | None = None, *, top_k: int = 0
) -> dict[str, Recipe]:
    """Rewrite `model` in place so that it reads constants in place of weight inputs.

    Args:
        model: specialized graph without functions.
        weights: weight input -> recipe, already in the dtypes of the specialization.
        how: which weights become codes; None: none.
        top_k: experts of a token, where experts become codes.

    Returns:
        Constant name -> recipe of the constants that the graph now reads. They are still listed as inputs
        until `WeightFile.attach` gives them their place in the file.

    Raises:
        ProgramError: a custom operator reads a weight that no fold knows.
    """
    constants = dict(weights)
    alias: dict[str, str] = {}
    transposed: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        node.input[:] = [alias.get(name, name) for name in node.input]
        operator = operator_of(node)
        if operator is not None and operator.folded is not None:
            kept += _fold(node, operator.spec, operator.folded, constants, how, top_k)
            continue
        if how is not None and node.op_type == "MatMul" and node.input[1] in transposed:
            name = transposed[node.input[1]]
            if how.bits(name):
                quantize_linear(node, constants[name], name, how, constants)
        elif node.op_type == "Cast" and node.input[0] in constants:
            to = next(a.i for a in node.attribute if a.name == "to")
            if to == ONNX[constants[node.input[0]].dtype]:
                alias[node.output[0]] = node.input[0]
                continue
        elif node.op_type == "Transpose" and node.input[0] in constants:
            perm = next(tuple(a.ints) for a in node.attribute if a.name == "perm")
            name = f"{node.input[0]}.transposed"
            transposed[name] = node.input[0]
            constants[name] = transpose(constants[node.input[0]], perm)
            alias[node.output[0]] = name
            continue
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if any(node.domain == MS_DOMAIN for node in kept):
        model.opset_import.append(helper.make_opsetid(MS_DOMAIN, 1))
    read = {name for node in kept for name in node.input}
    result = {name: recipe for name, recipe in constants.items() if name in read}
    left = next((name for name, recipe in result.items() if recipe.dtype == "f8e4m3"), None)
    if left is not None:
        raise ProgramError(f"fold: the FP8 weight {left} is read by an operator that no fold knows")
    inputs = [value for value in model.graph.input if value.name not in weights]
    inputs += [helper.make_tensor_value_info(name, ONNX[r.dtype], r.shape) for name, r in result.items()]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return result


def _fold(
    node: onnx.NodeProto,
    spec: OpSpec,
    form: FoldedForm,
    constants: dict[str, Recipe],
    how: Quantization | None,
    top_k: int,
) -> list[onnx.NodeProto]:
    """Return what computes an operator whose FP8 weights become codes or are folded, the node itself in most cases."""
    inputs = dict(zip((arg.name for arg in spec.inputs), node.input))
    weights = {arg.name: f"{arg.name}_scale" for arg in spec.inputs if arg.dtype == "fp8"}
    if how is not None and all(how.bits(inputs[name]) for name in weights):
        if form.quantized == "QMoE":
            return quantize_experts(node, top_k, how, constants)
        ((name, scale),) = weights.items()
        weight = wide_values(constants[inputs[name]], constants[inputs[scale]], "f32")
        quantize_linear(node, weight, inputs[name], how, constants)
        return [node]
    for name, scale in weights.items():
        weight = wide_values(constants[inputs[name]], constants[inputs.pop(scale)], "f32")
        *leading, rows, columns = range(len(weight.shape))
        constants[f"{inputs[name]}.folded"] = transpose(weight, (*leading, columns, rows))
        inputs[name] = f"{inputs[name]}.folded"
    node.op_type = form.op_type
    node.input[:] = list(inputs.values())
    return [node]


@dataclass
class WeightFile:
    """One external-data file that several graphs share: a constant with the same recipe is stored once.

    Attributes:
        name: file name beside the graphs.
        layout: who lies where.
        attached: constants of each graph, in the order in which graphs were attached.
    """

    name: str
    layout: WeightLayout = field(default_factory=WeightLayout)
    attached: list[Mapping[str, Recipe]] = field(default_factory=list)
    _pending: list[tuple[Recipe, int]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Size so far."""
        return self.layout.num_bytes

    def attach(self, model: onnx.ModelProto, constants: Mapping[str, Recipe]) -> None:
        """Make `constants` initializers of `model` with their place in this file."""
        self.attached.append(constants)
        inputs = [value for value in model.graph.input if value.name not in constants]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        for name, recipe in constants.items():
            size = constant_bytes(recipe)
            tensor = TensorProto(
                name=name, data_type=ONNX[recipe.dtype], dims=recipe.shape, data_location=TensorProto.EXTERNAL
            )
            place = {"location": self.name, "offset": str(self._place(recipe)), "length": str(size)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            model.graph.initializer.append(tensor)

    def _place(self, recipe: Recipe) -> int:
        offset, new = self.layout.place(recipe)
        if new:
            self._pending.append((recipe, offset))
        return offset

    def write(
        self,
        folder: Path,
        source: TensorSource,
        progress: Callable[[int, int], None],
        *,
        name: str | None = None,
        part: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    ) -> Path:
        """Evaluate every constant straight into the mapped file; extra memory is one operand at most.

        Args:
            folder: where the file is written.
            source: the checkpoint.
            progress: told (bytes that were written, bytes that will be).
            name: another name than the one that graphs give.
            part: returns what is written of a constant; of the same shape.
        """
        path = folder / (name or self.name)
        with path.open("wb") as file:
            _allocate(file, self.num_bytes)
        mapped = np.memmap(path, np.uint8, mode="r+", shape=(self.layout.num_bytes,))
        done, once = 0, QuantizedOnce.of(source)
        for recipe, offset in self._pending:
            dtype, size = NUMPY[recipe.dtype], constant_bytes(recipe)
            evaluate_into(part(recipe), once, mapped[offset : offset + size].view(dtype).reshape(recipe.shape))
            done += size
            progress(done, self.num_bytes)
        mapped.flush()
        return path


def _allocate(file: BinaryIO, num_bytes: int) -> None:
    """Make an empty file `num_bytes` long with its blocks allocated now: a full disk is an error here, not a crash in a
    mapping of the file. Systems without `posix_fallocate` get the blocks by writing zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return
    zeros = bytes(_ZEROS)
    for start in range(0, num_bytes, _ZEROS):
        file.write(zeros[: num_bytes - start])
    file.flush()


def limit_tables(weights: Mapping[str, Recipe], tables: Iterable[str], num_positions: int) -> dict[str, Recipe]:
    """Return `weights` with the RoPE tables cut to the positions that the engine accepts."""
    result = dict(weights)
    for name in tables:
        table = result[name]
        params = table.params | {"num_positions": num_positions}
        result[name] = replace(table, shape=(num_positions, table.shape[1]), params=params)
    return result
