"""Writing ONNX function bodies as text: exact constants, and the fragments that several operators share.

A body is ordinary ONNX text (`onnx.parser`), so it reads as the arithmetic it is. Names are unique in a whole
function, subgraphs included; the fragments below take a prefix for theirs. What may be written where:

* `ort` bodies may hold float8 values in Cast, Reshape, Transpose, DequantizeLinear and Scan, nothing else.
* `trt` bodies hold no float8 but as input of a blocked DequantizeLinear; no NonZero, no reduction in a scatter,
  and Scan has at least one loop-carried state.
* No intermediate result is larger than one expert, one layer's input, or one query row of every sequence
  (the indexer also keeps the sequences' keys). `ort` bodies work on blocks of query rows (`query_blocks`), which
  are as long as a budget allows and one row where a context is long.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx
import onnx.parser

from seekforge.common import dtypes
from seekforge.formats.paged_cache import BLOCK_SIZE
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.onnx_schema import PLUGIN_NAMESPACE
from seekforge.plugins.operator import DOMAIN, DOMAIN_VERSION, OpSpec

#: Opset of bodies, as of the programs they are attached to.
OPSET: Final = 23

#: Attribute values of a node, by name.
Attrs = Mapping[str, int | float | str | bool]

_BLOCK: Final = 128
_E4M3_MAX_INVERSE: Final = np.float32(1 / 448)  # 0x3B124925
_AMAX_FLOOR: Final = np.float32(1e-4)
_LOG2_E: Final = np.float32(1.4426950408889634)
#: Scales are 2^_SCALE_MIN … 2^_SCALE_MAX: from the floor of amax to the largest finite f32.
_SCALE_MIN, _SCALE_MAX = -22, 120
#: Binades of e4m3 magnitudes; below 2^-6 the step stays 2^-9.
_E4M3_MIN, _E4M3_MAX = -6, 8


class Text:
    """Collects the statements of one function and its constants.

    Constants are `Constant` nodes in front of the body: exact (never printed as decimals) and one per value.
    """

    def __init__(self) -> None:
        self._constants: dict[str, np.ndarray] = {}
        self._lines: list[str] = []

    def add(self, text: str) -> None:
        """Append statements."""
        self._lines.append(text)

    def f32(self, value: float | np.float32) -> str:
        """Return the name of a scalar f32 constant."""
        return self._constant("f", np.array(value, np.float32))

    def i64(self, value: int) -> str:
        """Return the name of a scalar int64 constant."""
        return self._constant("i", np.array(value, np.int64))

    def i32(self, value: int) -> str:
        """Return the name of a scalar int32 constant."""
        return self._constant("j", np.array(value, np.int32))

    def ints(self, *values: int) -> str:
        """Return the name of a 1-D int64 constant: axes, a shape, slice bounds."""
        return self._constant("v", np.array(values, np.int64))

    def table(self, values: np.ndarray) -> str:
        """Return the name of a constant array."""
        return self._constant("t", values)

    def _constant(self, kind: str, value: np.ndarray) -> str:
        for name, known in self._constants.items():
            if known.dtype == value.dtype and known.shape == value.shape and known.tobytes() == value.tobytes():
                return name
        name = f"{kind}{len(self._constants)}_"
        self._constants[name] = value
        return name

    def function(
        self, name: str, inputs: list[str], outputs: list[str], attributes: list[str], doc: str
    ) -> onnx.FunctionProto:
        """Return the function made of the collected statements."""
        function = onnx.parser.parse_function(
            f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n'
            f"{name} <{', '.join([*attributes, PLUGIN_NAMESPACE])}> ({', '.join(inputs)}) => ({', '.join(outputs)})\n"
            "{\n" + "\n".join(self._lines) + "\n}"
        )
        nodes = [
            onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
            for name, value in self._constants.items()
        ]
        nodes.extend(function.node)
        del function.node[:]
        function.node.extend(nodes)
        if any(node.domain == DOMAIN for node in nodes):
            function.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        function.doc_string = doc
        return function

    def body_of(self, spec: OpSpec) -> onnx.FunctionProto:
        """Return the function with the signature of `spec`; statements use the names of its arguments."""
        return self.function(
            spec.name,
            [arg.name for arg in spec.inputs],
            [arg.name for arg in spec.outputs],
            [attr.name for attr in spec.attrs],
            spec.doc,
        )


def onnx_type(dtype: str) -> int:
    """Return the ONNX number of one of our dtype names, for `Cast<to = …>`."""
    return dtypes.ONNX[dtype]


@functools.cache
def e4m3_table() -> np.ndarray:
    """Return the value of every e4m3 byte, f32 [256], in the order of signed bytes: entry b + 128 for int8 b."""
    return np.arange(-128, 128).astype(np.int8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def cast(text: Text, x: str, out: str, *, to: str, from_: str) -> str:
    """Cast `x` from dtype `from_`; returns `out`, or `x` where there is nothing to do."""
    if to == from_:
        return x
    text.add(f"{out} = Cast<to = {onnx_type(to)}>({x})")
    return out


def paged_slots(text: Text, out: str) -> None:
    """Write `out` [B, MB · BLOCK_SIZE] i64: the cache slot of every position that the input `block_table` reaches."""
    text.add(f"""
  blocks = Cast<to = {onnx_type("i64")}>(block_table)
  firsts = Mul(blocks, {text.i64(BLOCK_SIZE)})
  firsts3 = Unsqueeze(firsts, {text.ints(2)})
  slots3 = Add(firsts3, {text.table(np.arange(BLOCK_SIZE, dtype=np.int64))})
  {out} = Reshape(slots3, {text.ints(0, -1)})
""")


def fake_quantize(text: Text, x: str, p: str, *, dtype: str, bodies: str) -> str:
    """Round `x` [..., K] to e4m3 with a power-of-two scale per 128 values and back (spec §5.1).

    Args:
        x: name of the tensor, K a multiple of 128.
        p: prefix of the names made here.
        dtype: element type of `x`, f32 or bf16.
        bodies: `ort` rounds by a cast to float8; `trt` by arithmetic, as TensorRT casts no computed float8.

    Returns:
        Name of the result, same shape and dtype.
    """
    scaled, scale = scale_blocks(text, cast(text, x, f"{p}f", to="f32", from_=dtype), p)
    if bodies == "ort":
        text.add(f"{p}q8 = Cast<to = {onnx_type('f8e4m3')}>({scaled})")
        text.add(f"{p}q = Cast<to = {onnx_type('f32')}>({p}q8)")
    else:
        _round_to_e4m3(text, scaled, f"{p}q", f"{p}m")
    text.add(f"{p}qs = Mul({p}q, {scale})")
    text.add(f"{p}y = Reshape({p}qs, {p}shape)")
    return cast(text, f"{p}y", f"{p}yb", to=dtype, from_="f32")


def scale_blocks(text: Text, x: str, p: str) -> tuple[str, str]:
    """Divide each block of 128 values of `x` [..., K] f32 by its power-of-two scale (spec §5.1).

    The scale is 2^ceil(log2(amax / 448)). A logarithm only guesses the exponent (it is off by one on some
    exact powers of two); comparisons with a table of powers then settle it. The table also holds the reciprocals,
    so every product is exact. |x / scale| is at most 448 (1/448 in f32 is a little too large), so nothing
    has to be clamped.

    Returns:
        Names of the values over their scales, [blocks, 128], and of the scales, [blocks, 1].
    """
    exponents = np.arange(_SCALE_MIN - 1, _SCALE_MAX + 2)
    powers = text.table(np.exp2(exponents).astype(np.float32))
    inverse = text.table(np.exp2(-exponents).astype(np.float32))
    last = len(exponents) - 2
    text.add(f"""
  {p}shape = Shape({x})
  {p}b = Reshape({x}, {text.ints(-1, _BLOCK)})
  {p}abs = Abs({p}b)
  {p}amax = ReduceMax<keepdims = 1>({p}abs, {text.ints(-1)})
  {p}floored = Max({p}amax, {text.f32(_AMAX_FLOOR)})
  {p}p = Mul({p}floored, {text.f32(_E4M3_MAX_INVERSE)})
  {p}ln = Log({p}p)
  {p}lg = Mul({p}ln, {text.f32(_LOG2_E)})
  {p}ceil = Ceil({p}lg)
  {p}gf = Sub({p}ceil, {text.f32(float(exponents[0]))})
  {p}gi = Cast<to = {onnx_type("i32")}>({p}gf)
  {p}g1 = Max({p}gi, {text.i32(1)})
  {p}guess = Min({p}g1, {text.i32(last)})
  {p}below = Sub({p}guess, {text.i32(1)})
  {p}at = Gather({powers}, {p}guess)
  {p}half = Gather({powers}, {p}below)
  {p}low = Less({p}at, {p}p)
  {p}high = GreaterOrEqual({p}half, {p}p)
  {p}up = Cast<to = {onnx_type("i32")}>({p}low)
  {p}down = Cast<to = {onnx_type("i32")}>({p}high)
  {p}raised = Add({p}guess, {p}up)
  {p}e = Sub({p}raised, {p}down)
  {p}s = Gather({powers}, {p}e)
  {p}r = Gather({inverse}, {p}e)
  {p}v = Mul({p}b, {p}r)
""")
    return f"{p}v", f"{p}s"


def _round_to_e4m3(text: Text, v: str, out: str, p: str) -> None:
    """Write `out` = `v` rounded to the nearest e4m3 value, ties to even, for |v| <= 448 in f32.

    The step of the grid is 2^(floor(log2 |v|) − 3), at least 2^-9. A guessed exponent that is off by one beside
    a power of two gives the same result: both grids round such a value to that power.
    """
    exponents = np.arange(_E4M3_MIN, _E4M3_MAX + 1) - 3
    steps = text.table(np.exp2(exponents).astype(np.float32))
    inverse = text.table(np.exp2(-exponents).astype(np.float32))
    text.add(f"""
  {p}abs = Abs({v})
  {p}some = Max({p}abs, {text.f32(2.0**_E4M3_MIN)})
  {p}ln = Log({p}some)
  {p}lg = Mul({p}ln, {text.f32(_LOG2_E)})
  {p}floor = Floor({p}lg)
  {p}gf = Sub({p}floor, {text.f32(_E4M3_MIN)})
  {p}gi = Cast<to = {onnx_type("i32")}>({p}gf)
  {p}g0 = Max({p}gi, {text.i32(0)})
  {p}i = Min({p}g0, {text.i32(len(exponents) - 1)})
  {p}step = Gather({steps}, {p}i)
  {p}per = Gather({inverse}, {p}i)
  {p}n = Mul({v}, {p}per)
  {p}whole = Round({p}n)
  {out} = Mul({p}whole, {p}step)
""")


def dequantize_weight(text: Text, weight: str, scale: str, p: str, *, how: Specialization) -> str:
    """Write the [N, K] f32 values of an FP8 weight with 128×128 block scales, and return their name.

    Scale rows are repeated per weight row, so that the last, partial block of rows comes out right; K is a
    multiple of 128.

    Args:
        weight: name of [N, K] float8, or int8 with the same bytes; of kept values, which need no scale.
        scale: name of [⌈N/128⌉, K/128] f32.
        p: prefix of the names made here.
    """
    if how.fp8_storage == "kept":
        text.add(f"{p}w = Cast<to = {onnx_type('f32')}>({weight})")
        return f"{p}w"
    text.add(f"""
  {p}n1 = Shape<start = 0, end = 1>({weight})
  {p}n = Squeeze({p}n1)
  {p}rows = Range({text.i64(0)}, {p}n, {text.i64(1)})
  {p}block = Div({p}rows, {text.i64(_BLOCK)})
  {p}scales = Gather({scale}, {p}block)
""")
    if how.fp8_storage == "float8":
        text.add(f"{p}w = DequantizeLinear<axis = 1, block_size = {_BLOCK}>({weight}, {p}scales)")
        return f"{p}w"
    text.add(f"""
  {p}bytes = Cast<to = {onnx_type("i32")}>({weight})
  {p}index = Add({p}bytes, {text.i32(128)})
  {p}values = Gather({text.table(e4m3_table())}, {p}index)
  {p}blocks = Reshape({p}values, {text.ints(0, -1, _BLOCK)})
  {p}scales3 = Unsqueeze({p}scales, {text.ints(2)})
  {p}scaled = Mul({p}blocks, {p}scales3)
  {p}w = Reshape({p}scaled, {text.ints(0, -1)})
""")
    return f"{p}w"


def matmul_transposed(text: Text, x: str, weight: str, p: str, *, dtype: str) -> str:
    """Write x · weightᵀ and return its name.

    Args:
        x: name of [..., K] in `dtype`.
        weight: name of [N, K] f32.
        dtype: f32 or bf16. With bf16 the weight is rounded to bf16, exactly so where its scales are powers
            of two, and the sum is rounded once.
    """
    text.add(f"{p}t = Transpose<perm = [1, 0]>({weight})")
    operand = cast(text, f"{p}t", f"{p}tb", to=dtype, from_="f32")
    text.add(f"{p}y = MatMul({x}, {operand})")
    return f"{p}y"


def swiglu(text: Text, gate_up: str, p: str, *, dtype: str) -> str:
    """Write silu(gate) · up for [..., gate | up], formed in f32 and rounded once, and return its name."""
    wide = cast(text, gate_up, f"{p}f", to="f32", from_=dtype)
    text.add(f"""
  {p}gate, {p}up = Split<axis = -1, num_outputs = 2>({wide})
  {p}sig = Sigmoid({p}gate)
  {p}silu = Mul({p}gate, {p}sig)
  {p}y = Mul({p}silu, {p}up)
""")
    return cast(text, f"{p}y", f"{p}yb", to=dtype, from_="f32")


def query_blocks(text: Text, most: str, tensors: Mapping[str, str]) -> None:
    """Write [B, Q, ...] tensors as blocks of query rows, [B, blocks, rows, values], for a Scan over axis 1.

    Also written: `rows1`, `query_count1` ([1] int64: rows of a block, Q), for `join_blocks`. A last block that is not
    full is padded.

    Args:
        most: name of [1] int64, most rows of a block.
        tensors: name -> constant that pads it; the blocks of `x` are called `x_blocks`. The first one tells Q.
    """
    first = next(iter(tensors))
    text.add(f"""
  query_count1 = Shape<start = 1, end = 2>({first})
  rows1 = Min(query_count1, {most})
  rounded = Add(query_count1, rows1)
  less_one = Sub(rounded, {text.ints(1)})
  block_count1 = Div(less_one, rows1)
  padded_count1 = Mul(block_count1, rows1)
  missing1 = Sub(padded_count1, query_count1)
  block_pads = Concat<axis = 0>({text.ints(0, 0, 0, 0)}, missing1, {text.ints(0)})
  block_shape = Concat<axis = 0>({text.ints(0)}, block_count1, rows1, {text.ints(-1)})
""")
    for name, filler in tensors.items():
        text.add(f"""
  {name}_flat = Reshape({name}, {text.ints(0, 0, -1)})
  {name}_padded = Pad({name}_flat, block_pads, {filler})
  {name}_blocks = Reshape({name}_padded, block_shape)
""")


def join_blocks(text: Text, blocks: str, tail: str, out: str) -> None:
    """Write `blocks` [B, blocks, rows, ...] as `out` [B, Q, *tail], without what `query_blocks` padded.

    Args:
        tail: name of a 1-D int64 tensor: the trailing dimensions.
    """
    text.add(f"""
  {out}_shape = Concat<axis = 0>({text.ints(0, -1)}, {tail})
  {out}_long = Reshape({blocks}, {out}_shape)
  {out} = Slice({out}_long, {text.ints(0)}, query_count1, {text.ints(1)})
""")
