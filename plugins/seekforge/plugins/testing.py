"""Test vectors, what runs them, and how results are compared. For tests; needs torch, onnx and onnxruntime.

A `Case` holds inputs in the reference types (f32 activations and caches, float8 weights); `typed` turns it into
those of a specialization, so that one vector serves them all.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import torch
from torch import Tensor

from seekforge.common import dtypes
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.functions.attach import attach
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.onnx_schema import register_schemas
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION, OpSpec
from seekforge.plugins.registry import SPECS
from seekforge.plugins.torch_ops import DTYPE_NAMES, TORCH_DTYPES

#: Slots of block 0: scrap, never compared.
SCRAP = BLOCK_SIZE

_BITS = {torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn), torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
_CACHE_FORMATS = ("kv_format", "index_format")


@dataclass(frozen=True)
class Case:
    """One test vector of an operator.

    Attributes:
        op: ONNX op_type.
        name: what it probes; unique within the operator.
        inputs: tensors in the order of the spec, optional ones behind; f32 activations and caches, float8 weights.
        attrs: attribute values.
    """

    op: str
    name: str
    inputs: tuple[Tensor, ...]
    attrs: dict[str, Any]

    @property
    def spec(self) -> OpSpec:
        """The operator's contract."""
        return SPECS[self.op]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def typed(self, how: Specialization) -> Case:
        """Return the case in the dtypes of a specialization; values are rounded where they must be."""
        variables = {"act": how.activations, "kv": how.kv_format}
        inputs = []
        args = self.spec.all_inputs
        for arg, tensor in zip(args, self.inputs, strict=False):
            if arg.dtype in variables:
                tensor = tensor.to(TORCH_DTYPES[variables[arg.dtype]])
            elif arg.dtype == "fp8" and how.fp8_storage == "int8":
                tensor = tensor.view(torch.int8)
            inputs.append(tensor)
        attrs = {key: how.kv_format if key in _CACHE_FORMATS else value for key, value in self.attrs.items()}
        return dataclasses.replace(self, inputs=tuple(inputs), attrs=attrs)

    def expected(self) -> tuple[Tensor, ...]:
        """Return what the reference computes, shapes and dtypes checked against the spec."""
        name = self.spec.torch_name
        importlib.import_module(f"seekforge.plugins.{name}.op")
        count = len(self.spec.inputs)
        optional = dict(list(self.spec.named(self.inputs).items())[count:])
        function = getattr(torch.ops.seekforge, name)
        if optional:  # torch knows nothing of them
            function = getattr(importlib.import_module(f"seekforge.plugins.{name}.reference"), name)
        result = function(*self.inputs[:count], *self.attrs.values(), **optional)
        return result if isinstance(result, tuple) else (result,)


def cases(*ops: str) -> list[Case]:
    """Return the vectors of the operators named (all, if none is), as `pytest.mark.parametrize` takes them."""
    return [case for op in ops or SPECS for case in _vectors(op).cases()]


def kernel_cases(*ops: str) -> list[Case]:
    """Return the same, and those with optional inputs, which kernels alone take: `optional_cases` of the vectors."""
    more = [case for op in ops or SPECS if SPECS[op].optional for case in _vectors(op).optional_cases()]
    return cases(*ops) + more


def _vectors(op: str) -> Any:
    return importlib.import_module(f"seekforge.plugins.{SPECS[op].torch_name}.vectors")


class Draw:
    """Seeded random inputs: the same numbers on every machine and in every run."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal f32."""
        return torch.randn(*shape, generator=self._generator)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform f32 in [low, high)."""
        return torch.rand(*shape, generator=self._generator) * (high - low) + low

    def integers(self, *shape: int, low: int, high: int) -> Tensor:
        """Uniform int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator)

    def order(self, count: int) -> Tensor:
        """A permutation of 0 … count − 1, int64."""
        return torch.randperm(count, generator=self._generator)

    def fp8(self, *shape: int) -> Tensor:
        """e4m3 weights that use all of the range, subnormals included."""
        magnitude = torch.exp2(self.uniform(*shape, low=-9.0, high=8.5))
        return (torch.sign(self.normal(*shape)) * magnitude).to(torch.float8_e4m3fn)

    def weight_scale(self, *shape: int) -> Tensor:
        """Block scales that are no powers of two and differ by up to 16 from block to block."""
        return torch.exp2(self.uniform(*shape, low=-12.0, high=-8.0))

    def block_table(self, num_sequences: int, max_blocks: int, num_blocks: int) -> Tensor:
        """[B, MB] int32: blocks 1 … NB − 1 in shuffled order, none used twice."""
        used = self.order(num_blocks - 1)[: num_sequences * max_blocks] + 1
        return used.reshape(num_sequences, max_blocks).to(torch.int32)


# --- comparing ------------------------------------------------------------------------------------------------


def calc_diff(actual: Tensor, expected: Tensor) -> float:
    """Return 1 − 2·Σxy / Σ(x² + y²) in f64: 0 for equal tensors, also when both are zero (spec §11)."""
    x, y = actual.double().flatten(), expected.double().flatten()
    total = float((x * x + y * y).sum())
    return 0.0 if total == 0 else 1.0 - 2.0 * float((x * y).sum()) / total


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute error as a share of the spread (max − min) of `expected`.

    A constant `expected` counts by its magnitude. Not finite values must be the same in both, else the result
    is infinite.
    """
    x, y = actual.double(), expected.double()
    if x.shape != y.shape:
        return float("inf")
    finite = y.isfinite()
    if not torch.equal(finite, x.isfinite()) or not torch.equal(x[~finite].nan_to_num(7.0), y[~finite].nan_to_num(7.0)):
        return float("inf")
    x, y = x[finite], y[finite]
    if y.numel() == 0:
        return 0.0
    spread = float(y.max() - y.min()) or float(y.abs().max()) or 1.0
    return float((x - y).abs().max()) / spread


def equal_bits(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes (`torch.equal` knows no float8)."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def same_selection(actual: Tensor, expected: Tensor, scores: Tensor, gap: float) -> bool:
    """Return whether rows select the same, or differ only in entries that score like the boundary.

    Args:
        actual: [..., k] indices, −1 for none; order does not matter.
        expected: same shape.
        scores: [..., L] score of every entry, −inf where it may not be selected.
        gap: how far from the k-th score a differing entry may be, as a share of the row's spread.
    """
    if actual.shape != expected.shape:
        return False
    flat = (actual.flatten(0, -2), expected.flatten(0, -2), scores.flatten(0, -2))
    for got, want, score in zip(*flat, strict=True):
        chosen, wanted = got[got >= 0].tolist(), want[want >= 0].tolist()
        if len(chosen) != len(wanted) or len(set(chosen)) != len(chosen):
            return False
        differ = list(set(chosen) ^ set(wanted))
        if not differ:
            continue
        finite = score[score.isfinite()]
        last = score[wanted].min()
        if (score[differ] - last).abs().max() > gap * (finite.max() - finite.min()):
            return False
    return True


# --- tensors between torch, NumPy and ONNX Runtime ------------------------------------------------------------


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return the array that shares a CPU tensor's bytes; bf16 and float8 as ml_dtypes."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in _BITS:
        bits, dtype = _BITS[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Tensor:
    """Undo `to_numpy`."""
    array = np.ascontiguousarray(array)
    for dtype, (bits, known) in _BITS.items():
        if array.dtype == known:
            return torch.from_numpy(array.view(str(bits).removeprefix("torch."))).view(dtype)
    return torch.from_numpy(array)


def to_ort(tensor: Tensor) -> tuple[onnxruntime.OrtValue, Any]:
    """Return an OrtValue of a CPU tensor and what must stay alive as long as it (they share memory)."""
    array = to_numpy(tensor)
    element = dtypes.ONNX[DTYPE_NAMES[tensor.dtype]]
    if tensor.dtype in _BITS:
        array = array.view({1: np.uint8, 2: np.uint16}[array.itemsize])
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element), array


def run_model(
    model: onnx.ModelProto,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    *,
    library: Path | None = None,
    threads: int = 1,
) -> None:
    """Run a model in ONNX Runtime on the CPU, writing into `outputs`; a tensor in both is updated in place.

    Args:
        inputs: name -> tensor.
        outputs: every output of the model, in its order: name -> contiguous tensor of the right shape and dtype.
        library: a library of operators.
        threads: how many one operator has. Tensors are small, and waiting threads would only disturb other tests.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {id(t): to_ort(t) for t in [*inputs.values(), *outputs.values()]}
    for name, tensor in inputs.items():
        binding.bind_ortvalue_input(name, values[id(tensor)][0])
    for name, tensor in outputs.items():
        binding.bind_ortvalue_output(name, values[id(tensor)][0])
    session.run_with_iobinding(binding)


# --- one operator ---------------------------------------------------------------------------------------------


def make_node(op: str, attrs: Mapping[str, Any], name: str = "") -> onnx.NodeProto:
    """Return a node of an operator whose values are named as in its spec."""
    spec = SPECS[op]
    node = onnx.helper.make_node(
        op, [a.name for a in spec.inputs], [a.name for a in spec.outputs], name=name, domain=DOMAIN
    )
    for key, value in attrs.items():
        node.attribute.append(onnx.helper.make_attribute(key, int(value) if isinstance(value, bool) else value))
    return node


def one_node_model(
    op: str,
    attrs: Mapping[str, Any],
    how: Specialization,
    inputs: Sequence[tuple[str, Sequence[int | str]]],
    outputs: Sequence[tuple[str, Sequence[int | str]]],
) -> onnx.ModelProto:
    """Return a model of one node with its function attached.

    Args:
        inputs: (dtype name, shape) per input; a string is a symbolic size.
        outputs: the same per output.
    """
    spec = SPECS[op]

    def values(args: Iterable[Any], types: Sequence[tuple[str, Sequence[int | str]]]) -> list[onnx.ValueInfoProto]:
        return [
            onnx.helper.make_tensor_value_info(arg.name, dtypes.ONNX[dtype], list(shape))
            for arg, (dtype, shape) in zip(args, types, strict=True)
        ]

    graph = onnx.helper.make_graph(
        [make_node(op, attrs, "node")], op, values(spec.inputs, inputs), values(spec.outputs, outputs)
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    attach(model, how)
    return model


def check_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """Check a model with its functions, then inlined: then the bodies themselves are checked and typed.

    Returns:
        The inlined model.
    """
    register_schemas()
    onnx.checker.check_model(model, full_check=True)
    inlined = onnx.inliner.inline_local_functions(model)
    onnx.checker.check_model(inlined, full_check=True)
    onnx.shape_inference.infer_shapes(inlined, check_type=True, strict_mode=True, data_prop=True)
    return inlined


def run_function(
    op: str,
    inputs: Sequence[Tensor],
    attrs: Mapping[str, Any],
    how: Specialization,
    *,
    library: Path | None = None,
    threads: int = 1,
) -> tuple[Tensor, ...]:
    """Run an operator's function body in ONNX Runtime, after checking it.

    Args:
        inputs: tensors in the dtypes of `how`, in the order of the spec; a body takes no optional ones.
        attrs: attribute values.
        how: what the body is made for; ONNX Runtime computes in f32 activations only.
        library: runs the operator of this library in place of the body, which is then taken out of the model.
        threads: how many one operator has.

    Returns:
        The outputs, in the order of the spec.
    """
    spec = SPECS[op]
    names = [DTYPE_NAMES[t.dtype] for t in inputs]
    shapes = spec.output_shapes(spec.bind([tuple(t.shape) for t in inputs], attrs))
    kinds = spec.output_dtypes({arg.name: name for arg, name in zip(spec.inputs, names, strict=True)})
    model = one_node_model(
        op,
        attrs,
        how,
        [(name, tuple(t.shape)) for name, t in zip(names, inputs, strict=True)],
        list(zip(kinds, shapes, strict=True)),
    )
    check_body(model)
    if library is not None:
        del model.functions[:]
    results = tuple(torch.empty(shape, dtype=TORCH_DTYPES[kind]) for shape, kind in zip(shapes, kinds, strict=True))
    run_model(
        model,
        {arg.name: t for arg, t in zip(spec.inputs, inputs, strict=True)},
        {arg.name: t for arg, t in zip(spec.outputs, results, strict=True)},
        library=library,
        threads=threads,
    )
    return results
