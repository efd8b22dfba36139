"""What an operator is, written once: its contract, and all that the rest of the tree knows of it.

Every operator folder has a `spec.py` with one `OpSpec`; torch schema, ONNX schema and checks are made from it. Shapes
are symbolic: `("B", "Q", "Hi", 128)`. A symbol is bound where it first stands alone and compared everywhere else; an
entry may also be an expression over bound symbols and attributes, such as `"cdiv(N, 128)"`. A leading `"*name"` stands
for any number of axes.

Beside it `operator.py` has one `Operator`, which the registry lists. Its fields have no defaults: an operator that says
nothing of its kernels, its taps or its products fails as it is imported. Descriptions import neither torch, onnx nor
triton, since the runtime reads them as it starts; code that does is named, and `load` imports it when it is wanted.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from seekforge.common.errors import ShapeError

if TYPE_CHECKING:  # the runtime starts without it
    from seekforge.formats.checkpoint.model_config import ModelConfig
    from seekforge.formats.parallelism import Parallelism, RankSizes

#: ONNX domain of every operator, and the TensorRT plugin namespace.
DOMAIN = "seekforge"
#: Version of the domain in a model's opset imports.
DOMAIN_VERSION = 1

#: The provider of every operator's own kernels.
TRITON = "triton"
#: What kernels take for FP8 weights: values, or INT8-typed bytes where a target has no float8.
STORED_FP8 = ("f8e4m3", "i8")
#: Type variables of arguments, and what each may be. A fixed type names itself.
TYPE_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "act": ("bf16", "f32"),  # activations
    "fp8": (*STORED_FP8, "bf16", "f32"),  # FP8 weights, or kept ones, whose scales are 1
    "kv": ("bf16", "f32", "i8"),  # caches: i8 is the byte layout of kv_format fp8_ds
}

Dim = int | str
Value = TypeVar("Value")


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
        optional: inputs behind `inputs`, which nodes of a GPU build may have: none of them, or the first few. Programs,
            torch and function bodies know nothing of them. A symbol that no input binds is 0.
    """

    name: str
    version: int
    doc: str
    inputs: tuple[Arg, ...]
    outputs: tuple[Arg, ...]
    attrs: tuple[Attr, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    optional: tuple[Arg, ...] = ()

    @property
    def all_inputs(self) -> tuple[Arg, ...]:
        """The inputs, optional ones behind."""
        return (*self.inputs, *self.optional)

    def named(self, values: Sequence[Value]) -> dict[str, Value]:
        """Return what stands for each input by its name.

        Args:
            values: one for each input in order; those of optional inputs may be left out at the end.

        Raises:
            ShapeError: there are too few or too many.
        """
        args = self.all_inputs
        if not len(self.inputs) <= len(values) <= len(args):
            most = f" to {len(args)}" if self.optional else ""
            raise ShapeError(f"{self.name}: {len(values)} inputs, expected {len(self.inputs)}{most}")
        return {arg.name: value for arg, value in zip(args, values, strict=False)}

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

    def has_input_of(self, dtype: str) -> bool:
        """Return whether an input has this dtype or type variable."""
        return any(arg.dtype == dtype for arg in self.inputs)

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
            shapes: one per input, in order, optional ones may end early; entries are ints, or symbolic sizes (not
                compared).
            attrs: attribute values, usable in shape expressions.

        Returns:
            Symbol -> size, attributes included.

        Raises:
            ShapeError: a rank, a size or the number of inputs differs.
        """
        bound: dict[str, Any] = dict(attrs)
        by_name = self.named(shapes)
        for arg in self.all_inputs:
            expected = list(arg.shape)
            if arg.name not in by_name:
                absent = (dim for dim in expected if isinstance(dim, str) and dim.isidentifier())
                bound |= {dim: 0 for dim in absent if dim not in bound}
                continue
            shape = list(by_name[arg.name])
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
        for arg in self.all_inputs:
            if arg in self.optional and arg.name not in input_dtypes:
                continue
            dtype = input_dtypes[arg.name]
            allowed = TYPE_VARIABLES.get(arg.dtype, (arg.dtype,))
            if dtype not in allowed:
                raise ShapeError(f"{self.name}: {arg.name} is {dtype}, expected {' or '.join(allowed)}")
            if arg.dtype in TYPE_VARIABLES and variables.setdefault(arg.dtype, dtype) != dtype:
                raise ShapeError(
                    f"{self.name}: {arg.name} is {dtype}, expected {variables[arg.dtype]} like the inputs before it"
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


# --- all that is known of an operator ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """What one rank computes of a model.

    Attributes:
        config: the model's `config.json`.
        numerics: the fields of `formats.numerics.Numerics`.
        kv_format: layout and dtype of both caches.
        parallelism: how ranks share the model.
        nvfp4_experts: whether it has the weights of experts in NVFP4.
    """

    config: ModelConfig
    numerics: Mapping[str, Any]
    kv_format: str
    parallelism: Parallelism
    nvfp4_experts: bool = False

    @property
    def sizes(self) -> RankSizes:
        """What the rank has of the model's heads, MLPs and experts."""
        return self.parallelism.rank_sizes(self.config)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The largest step of a rank: what scratch memory is reserved for.

    Attributes:
        batch: sequences.
        queries: new tokens of each.
        num_blocks: blocks of the longest sequence.
        expert_tokens: tokens that the rank's experts see.
        fp8_linears: (out features, in features) of each kind of linear with FP8 weights.
        bf16_linears: the same of linears with BF16 weights and f32 results.
    """

    batch: int
    queries: int
    num_blocks: int
    expert_tokens: int
    fp8_linears: Sequence[tuple[int, int]]
    bf16_linears: Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Products:
    """The matrix products of an operator, as the audit of an engine counts them.

    Attributes:
        flops: (shapes of the inputs that are weights by name, config, keys that a token sees) -> FLOPs of one decoded
            token, 2 per multiply and add.
        in_plugin: (attributes, shapes of the inputs that are weights by name) -> dtype of the factors in the kernels
            where the target multiplies FP8.
        inlined: dtype in which the standard operators multiply that TensorRT gets in place of the plugin.
    """

    flops: Callable[[Mapping[str, Sequence[int]], ModelConfig, int], float]
    in_plugin: Callable[[Mapping[str, Any], Mapping[str, Sequence[int]]], Literal["fp8", "f16", "bf16"]]
    inlined: Literal["bf16", "f32"]


@dataclass(frozen=True)
class InlinedLimit:
    """What TensorRT takes of the standard operators in place of a plugin.

    Attributes:
        key: key of `config.json`.
        most: its largest value.
        reason: what limits it, the beginning of the sentence "... at most".
    """

    key: str
    most: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Names that `parity` gives to tensors of an operator: name of the input or output in the spec -> tap."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


#: Of an operator whose tensors have no names of their own: its neighbors, or its weight, tell what they are.
NO_TAPS = Taps(inputs={}, outputs={})


@dataclass(frozen=True, kw_only=True)
class FoldedForm:
    """The form that an engine for the CPU has, in which FP8 weights are dequantized and transposed by the build.

    Its inputs are those of the spec without the scales, which are the input `NAME_scale` of each FP8 weight `NAME`.

    Attributes:
        op_type: ONNX op_type of the form.
        body: `module:function` that makes its ONNX function from the attributes.
        quantized: operator of ONNX Runtime that takes the same weights as int8 or int4 codes.
        native: whether the library of CPU operators has the form, as `Operator.native` says of the operator.
    """

    op_type: str
    body: str
    quantized: Literal["MatMulNBits", "QMoE"]
    native: bool


@dataclass(frozen=True, kw_only=True)
class LibraryForm:
    """The operator as CUDA C++ over the headers of a library (`providers.library`). Not run on a GPU yet.

    Attributes:
        launch: module of the launch plans (`launch_plan.OpKernels`) with the same static sizes. Kernels of its variants
            are `extern "C"`, and constants are macros, `SEEKFORGE_` before their names.
        cost: as that of `KernelForm`.
        source: file of the device code, beside `launch`.
    """

    launch: str
    cost: str
    source: str


@dataclass(frozen=True, kw_only=True)
class KernelForm:
    """The operator as Triton kernels. Sizes stand under the symbols of the spec.

    Attributes:
        launch: module of the launch plans (`launch_plan.OpKernels`); `kernel.py` beside it has the device code.
        cost: module that says what each launch moves and computes (`cost.work.OpCost`).
        static_sizes: what a model fixes: sizes and attributes that the kernels are compiled for, and limits look at.
        step_sizes: what one step fixes beside them, for each kind of call.
        known_spills: (variant, SM) -> most bytes of stack that a compiled kernel may have, and why.
        known_mma_sync: (variant, SM) -> why it multiplies with mma.sync on SMs that have wgmma or tcgen05.
        libraries: provider -> the same operator from a library that the user installs.
    """

    launch: str
    cost: str
    static_sizes: Callable[[RankModel], dict[str, Any]]
    step_sizes: Callable[[RankModel, Step], Iterable[dict[str, Any]]]
    known_spills: Mapping[tuple[str, int], tuple[int, str]]
    known_mma_sync: Mapping[tuple[str, int], str]
    libraries: Mapping[str, LibraryForm]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All that is known of an operator.

    Attributes:
        spec: its contract.
        in_programs: whether exported programs have it. If not, a build for GPUs puts it in place of standard operators;
            products are listed under the name of their weight.
        body: `module:function` that makes its ONNX function from the attributes and the specialization.
        inlined_limits: what TensorRT takes of that function.
        inlined_weights: how the function stores FP8 weights for TensorRT: float8 where the target has it, or always
            INT8-typed bytes. None without FP8 weights.
        inlined_scratch: (model, step) -> bytes that the function's operators hold at once on a GPU where the operator
            is no plugin; None where they hold no more than its kernels.
        folded: the form for CPUs; None where nothing is folded.
        native: whether the library of CPU operators has it, in the folder's `cpu/` (`plugins.native`).
        products: its matrix products; None where it has none.
        taps: what `parity` sees of it.
        kernels: None for an operator that TensorRT itself has a layer for.
    """

    spec: OpSpec
    in_programs: bool
    body: str
    inlined_limits: tuple[InlinedLimit, ...]
    inlined_weights: Literal["float8", "int8"] | None
    inlined_scratch: Callable[[RankModel, Step], int] | None
    folded: FoldedForm | None
    native: bool
    products: Products | None
    taps: Taps
    kernels: KernelForm | None


def load(dotted: str) -> Any:
    """Import what a description names, `module` or `module:attribute`, and return it."""
    module, _, attribute = dotted.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
