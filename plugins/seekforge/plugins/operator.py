"""What an operator takes and gives, written once; torch schema, ONNX schema and checks are made from it.

Every operator folder has a `spec.py` with one `OpSpec`. Shapes are symbolic: `("B", "Q", "Hi", 128)`. A
symbol is bound where it first stands alone and compared everywhere else; an entry may also be an
expression over bound symbols and attributes, such as `"cdiv(N, 128)"`. A leading `"*name"` stands for
any number of axes.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from seekforge.common.errors import ShapeError

#: ONNX domain of every operator, and the TensorRT plugin namespace.
DOMAIN = "seekforge"
#: Version of the domain in a model's opset imports.
DOMAIN_VERSION = 1

#: Type variables of arguments, and what each may be. A fixed type names itself.
TYPE_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "act": ("bf16", "f32"),  # activations
    "fp8": ("f8e4m3", "i8"),  # FP8 weights: as values, or as INT8-typed bytes where a target has no float8
    "kv": ("bf16", "f32", "i8"),  # caches: i8 is the byte layout of kv_format fp8_ds
}

Dim = int | str


@dataclass(frozen=True)
class Arg:
    """One tensor of an operator: its name, dtype (or type variable), symbolic shape, and meaning."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    doc: str


@dataclass(frozen=True)
class Attr:
    """One attribute: name, kind, allowed values (None: any), and meaning."""

    name: str
    kind: Literal["int", "float", "str", "bool"]
    doc: str
    values: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class OpSpec:
    """An operator's contract.

    Attributes:
        name: ONNX op_type. Unique over all domains: parsers look at it alone.
        version: raised when results or signature change.
        aliases: output name -> input name; the runtime binds both to one buffer, torch returns a new tensor.
    """

    name: str
    version: int
    doc: str
    inputs: tuple[Arg, ...]
    outputs: tuple[Arg, ...]
    attrs: tuple[Attr, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def torch_name(self) -> str:
        """Name of the torch operator in namespace `seekforge`: snake case of `name`."""
        return "".join("_" + c.lower() if c.isupper() else c for c in self.name).lstrip("_")

    def torch_schema(self) -> str:
        """The signature for `torch.library.define`: tensors in order, then attributes."""
        args = [f"Tensor {arg.name}" for arg in self.inputs]
        args += [f"{attr.kind} {attr.name}" for attr in self.attrs]
        results = ", ".join("Tensor" for _ in self.outputs)
        return f"({', '.join(args)}) -> {results if len(self.outputs) == 1 else f'({results})'}"

    def check_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Compare `attrs` with the declared ones.

        Raises:
            ShapeError: one is missing, unknown, or has a value that is not allowed.
        """
        declared = {attr.name: attr for attr in self.attrs}
        if set(attrs) != set(declared):
            raise ShapeError(f"{self.name}: attributes {sorted(attrs)}, expected {sorted(declared)}")
        for name, value in attrs.items():
            allowed = declared[name].values
            if allowed is not None and value not in allowed:
                raise ShapeError(f"{self.name}: {name} is {value!r}, expected one of {list(allowed)}")

    def bind(self, shapes: Sequence[Sequence[Any]], attrs: Mapping[str, Any]) -> dict[str, Any]:
        """Match the input shapes with the contract.

        Args:
            shapes: one per input, in order; entries are ints, or symbolic sizes (not compared).
            attrs: attribute values, usable in shape expressions.

        Returns:
            Symbol -> size, attributes included.

        Raises:
            ShapeError: a rank or a size differs.
        """
        bound: dict[str, Any] = dict(attrs)
        for arg, shape in zip(self.inputs, shapes, strict=True):
            expected = list(arg.shape)
            shape = list(shape)
            if expected and isinstance(expected[0], str) and expected[0].startswith("*"):
                lead = len(shape) - len(expected) + 1
                if lead < 0:
                    raise ShapeError(self._mismatch(arg, shape, bound))
                bound.setdefault(expected[0], tuple(shape[:lead]))
                expected, shape = expected[1:], shape[lead:]
            if len(expected) != len(shape):
                raise ShapeError(self._mismatch(arg, shape, bound))
            for want, got in zip(expected, shape, strict=True):
                if isinstance(want, str) and want.isidentifier() and want not in bound:
                    bound[want] = got
                    continue
                value = evaluate_dim(want, bound)
                if isinstance(value, int) and isinstance(got, int) and value != got:
                    raise ShapeError(self._mismatch(arg, shape, bound))
        return bound

    def _mismatch(self, arg: Arg, shape: Sequence[Any], bound: Mapping[str, Any]) -> str:
        known = ", ".join(f"{k}={v}" for k, v in bound.items() if isinstance(v, int) and k.isidentifier())
        wanted = "[" + ", ".join(str(dim) for dim in arg.shape) + "]"
        return f"{self.name}: {arg.name} is {list(shape)}, expected {wanted}" + (f" with {known}" if known else "")

    def output_shapes(self, bound: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Return the output shapes for symbols as returned by `bind`."""
        result = []
        for arg in self.outputs:
            shape: list[Any] = []
            for dim in arg.shape:
                value = evaluate_dim(dim, bound)
                shape.extend(value) if isinstance(value, tuple) else shape.append(value)
            result.append(tuple(shape))
        return result

    def output_dtypes(self, input_dtypes: Mapping[str, str]) -> list[str]:
        """Return the output dtypes, given those of the inputs by name.

        Raises:
            ShapeError: an input has a dtype that its type does not allow, or one variable has two values.
        """
        variables: dict[str, str] = {}
        for arg in self.inputs:
            found = input_dtypes[arg.name]
            allowed = TYPE_VARIABLES.get(arg.dtype, (arg.dtype,))
            if found not in allowed:
                raise ShapeError(f"{self.name}: {arg.name} is {found}, expected {' or '.join(allowed)}")
            if arg.dtype in TYPE_VARIABLES and variables.setdefault(arg.dtype, found) != found:
                raise ShapeError(
                    f"{self.name}: {arg.name} is {found}, expected {variables[arg.dtype]} like the inputs before it"
                )
        return [variables.get(arg.dtype, arg.dtype) for arg in self.outputs]


def cdiv(a: Any, b: Any) -> Any:
    """Return a / b rounded up."""
    return -(-a // b)


@functools.cache
def _parse(expression: str) -> ast.Expression:
    return ast.parse(expression, mode="eval")  # pyright: ignore[reportReturnType]


def evaluate_dim(dim: Dim, bound: Mapping[str, Any]) -> Any:
    """Return the size that `dim` stands for: an int, a bound symbol (or `*name`), or an expression."""
    if isinstance(dim, int):
        return dim
    if dim in bound:
        return bound[dim]

    def walk(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return bound[node.id]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cdiv":
            return cdiv(*(walk(arg) for arg in node.args))
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.FloorDiv):
                return left // right
        raise ValueError(f"shape expression {dim!r} uses something else than + * // and cdiv")

    return walk(_parse(dim).body)
