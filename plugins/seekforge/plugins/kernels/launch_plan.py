"""Compiled kernels as data: what was compiled, what a launch needs, and the launches of one operator call.

Everything between `kernel.py` (Triton, build time) and a driver (run time) is a plain value here: no torch, no Triton,
no CUDA. A `KernelSet` is one JSON file beside its cubins; a `LaunchPlan` says which images run in which order on which
grid, with arguments that name the operator's tensors or a place in its workspace. So argument packing and launch
plans are tested on a CPU, and the interpreter runs the very plan that a GPU would.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from seekforge.common.errors import EngineError, ShapeError
from seekforge.common.paths import inside, name_fault
from seekforge.common.reading import SETTINGS_BYTES, parse_json, read_bytes, read_text
from seekforge.plugins.kernels.constraints import Rule
from seekforge.plugins.kernels.index import kernel_sm
from seekforge.plugins.operator import load
from seekforge.plugins.registry import KERNEL_FORMS, SPECS

#: Version of the descriptor file.
FORMAT: Final = 2
#: Name that a `Buffer` uses for the operator's scratch memory.
WORKSPACE: Final = "workspace"
#: Every part of a workspace starts at a multiple of this.
ALIGNMENT: Final = 256
#: Pointers that kernels are compiled for are multiples of this.
POINTER_ALIGNMENT: Final = 16
#: GPU generations that kernels are compiled for. Cubins run on their own SM only, except sm_80, which also runs on 86.
SMS: Final[tuple[int, ...]] = (80, 89, 90, 100, 103, 120, 121)

#: What CUDA takes as arguments of one launch, and the largest file of one kernel, bytes.
_MOST_ARGUMENT_BYTES: Final = 32_768
_MOST_CUBIN_BYTES: Final = 256 << 20

Scalar = int | float | bool | str


def has_fp8(sm: int) -> bool:
    """Return whether tensor cores of `sm` multiply FP8; else bytes are widened to bf16."""
    return sm >= 89


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def is_datacenter(sm: int) -> bool:
    """Return whether `sm` has wgmma or tcgen05 and some 227 KiB of shared memory per block."""
    return sm in (90, 100, 103)


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of compile-time values.

    Attributes:
        name: unique within the operator.
        kernel: function in the operator's `kernel.py`.
        types: run-time argument -> Triton type, in the order of the signature.
        constants: compile-time argument -> value.
        aligned: integer arguments that are multiples of 16 (pointers always are).
        num_warps: warps per block.
        num_stages: depth of the load pipeline.
        main_loop: whether it is a loop over matrix products, where a spill costs time.
    """

    name: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Scalar]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    main_loop: bool = False


@dataclass(frozen=True)
class Buffer:
    """An address: a tensor of the operator by name, or `WORKSPACE`, plus bytes."""

    name: str
    offset: int = 0

    def __post_init__(self) -> None:
        if self.offset < 0 or self.offset % POINTER_ALIGNMENT:
            raise ShapeError(f"{self.name}: offset {self.offset} is not a multiple of {POINTER_ALIGNMENT}")


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `arguments` has every run-time argument of the variant by name."""

    variant: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Buffer | int | float]


@dataclass(frozen=True)
class LaunchPlan:
    """The launches of one operator call, in order on one stream."""

    launches: tuple[Launch, ...]
    workspace_bytes: int = 0


class Workspace:
    """Lays out scratch memory: parts in order, each aligned."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, num_bytes: int) -> Buffer:
        """Return the next part of `num_bytes`."""
        start = self.size
        self.size += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return Buffer(WORKSPACE, start)


@dataclass(frozen=True)
class Param:
    """One parameter as the cubin declares it; `name` is empty for the two hidden scratch pointers."""

    name: str
    type: str
    offset: int
    size: int


@dataclass(frozen=True)
class Resources:
    """What an image costs, read from the compiled code.

    Attributes:
        registers: how many a thread has.
        stack_bytes: bytes of stack per thread; more than 0 nearly always means spilled registers.
        shared_bytes: dynamic shared memory per block.
        occupancy: resident warps over the most an SM holds, from the three above.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    occupancy: float


@dataclass(frozen=True)
class Image:
    """One compiled kernel: all that a launcher needs.

    Attributes:
        variant: name of the `Variant` that it was made from.
        entry: symbol in the cubin.
        cubin: file name beside the descriptor.
        sha256: digest of that file.
        num_warps: warps per block of the launch; can be more than was asked for.
        num_ctas: blocks per cluster.
        scratch_bytes: hidden global scratch per block.
        scratch_align: its alignment.
        params: the parameters in order, the two hidden ones last.
        main_loop: as in `Variant`.
        driver: the CUDA version that a driver must have to load it, 13000 for 13.0 (`cuda_driver.needed_driver`).
        resources: registers and the like.
    """

    variant: str
    entry: str
    cubin: str
    sha256: str
    num_warps: int
    num_ctas: int
    scratch_bytes: int
    scratch_align: int
    params: tuple[Param, ...]
    main_loop: bool
    driver: int
    resources: Resources


@dataclass(frozen=True)
class KernelSet:
    """All images of one operator for one SM and one set of static sizes: the content of a descriptor file.

    Attributes:
        digest: that of everything from which the images are made, without the SM: an engine for several SMs has one.
        statics: sizes and attributes that are fixed in the code.
        compiler: name and version.
    """

    op: str
    op_version: int
    sm: int
    digest: str
    statics: Mapping[str, Scalar]
    compiler: str
    images: Mapping[str, Image]
    format: int = field(default=FORMAT)


class OpKernels(Protocol):
    """What an operator's `launch` module gives. `bound` is what `OpSpec.bind` returns: sizes and attributes."""

    #: Names in `bound` that are fixed at compile time.
    STATICS: tuple[str, ...]
    #: Conditions on single sizes.
    RULES: tuple[Rule, ...]
    #: What else the kernels take or need, a sentence each. Rules and notes are generated into the docs.
    NOTES: tuple[str, ...]

    def check(self, statics: Mapping[str, Any]) -> None:
        """Raise `ShapeError` with a sentence when there are no kernels for these statics."""
        ...

    def variants(self, statics: Mapping[str, Any], sm: int) -> tuple[Variant, ...]:
        """Return every variant that a plan for these statics may name."""
        ...

    def workspace_bytes(self, bound: Mapping[str, Any], sm: int) -> int:
        """Return the most scratch of a plan for these sizes or for smaller run-time ones: no less, and hardly more."""
        ...

    def plan(self, bound: Mapping[str, Any], sm: int) -> LaunchPlan:
        """Return the launches for these sizes."""
        ...


@functools.cache
def op_kernels(op: str) -> OpKernels:
    """Return the `launch` module of an operator by its ONNX op_type.

    Raises:
        ShapeError: the operator has no kernels.
    """
    if op not in KERNEL_FORMS:
        raise ShapeError(f"{op}: there are no kernels for it")
    return load(KERNEL_FORMS[op].launch)


def workspace_bytes(
    op: str, shapes: Sequence[Sequence[int]], attrs: Mapping[str, Any], sms: Collection[int] = SMS
) -> int:
    """Return the scratch bytes that one operator needs on the greediest of several GPUs.

    All who reserve scratch ask here: the plugin while an engine is built, the planner, and the checks of a build.

    Args:
        op: ONNX op_type.
        shapes: the largest shape of each input, in the order of the spec; smaller ones need no more.
        attrs: attribute values of the spec.
        sms: SMs on which the engine shall run.

    Raises:
        ShapeError: the shapes break the operator's contract, or it has no kernels.
    """
    return bound_workspace_bytes(op, SPECS[op].bind(shapes, attrs), sms)


def bound_workspace_bytes(op: str, bound: Mapping[str, Any], sms: Collection[int] = SMS) -> int:
    """Return the same where sizes and attributes stand under the symbols of the spec already."""
    return _bound_workspace_bytes(op, frozenset(bound.items()), frozenset(map(kernel_sm, sms)))


@functools.lru_cache(maxsize=1 << 15)  # a plan asks for the same products in thousands of settings
def _bound_workspace_bytes(op: str, bound: frozenset[tuple[str, Any]], sms: frozenset[int]) -> int:
    kernels, sizes = op_kernels(op), dict(bound)
    return max(kernels.workspace_bytes(sizes, sm) for sm in sms)


def most_rows(limit: int, axes: Sequence[int]) -> int:
    """Return the most rows, at most `limit`, that a step can have whose axes are at most so long.

    Args:
        limit: most rows.
        axes: largest size of each axis; rows are their product.
    """
    if not axes:
        return min(limit, 1)
    shortest, *rest = sorted(axes)
    if not rest:
        return min(limit, shortest)
    return max((size * most_rows(limit // size, rest) for size in range(1, min(shortest, limit) + 1)), default=0)


def statics_of(op: str, bound: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the compile-time values of an operator, checked.

    Args:
        op: ONNX op_type.
        bound: sizes and attributes, at least the static ones.

    Raises:
        ShapeError: there are no kernels for them; says what there is.
    """
    module = op_kernels(op)
    statics = {name: bound[name] for name in module.STATICS}
    module.check(statics)
    return statics


# --- arguments ------------------------------------------------------------------------------------------------


def resolve(arguments: Mapping[str, Buffer | int | float], addresses: Mapping[str, int]) -> dict[str, int | float]:
    """Return arguments with addresses in place of buffers.

    Args:
        arguments: those of a `Launch`.
        addresses: tensor name, or `WORKSPACE` -> device address.
    """
    return {
        name: addresses[value.name] + value.offset if isinstance(value, Buffer) else value
        for name, value in arguments.items()
    }


#: Triton type -> struct code; pointers are "Q".
_CODES: Final[dict[str, str]] = {"i1": "b", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f"}


def argument_code(param: Param) -> str:
    """Return the `struct` code of a parameter, little endian without padding."""
    return "Q" if not param.name or param.type.startswith("*") else _CODES[param.type]


def pack_arguments(image: Image, values: Mapping[str, int | float], *, scratch: int = 0) -> bytes:
    """Return the raw parameter buffer of a launch: user arguments, global scratch, profile scratch (null).

    Raises:
        EngineError: an argument is missing, left over or out of range.
    """
    named = [param.name for param in image.params if param.name]
    if set(named) != set(values):
        raise EngineError(f"{image.entry}: arguments {sorted(values)}, the kernel takes {sorted(named)}")
    last = image.params[-1]
    buffer = bytearray(last.offset + last.size)
    hidden = iter((scratch, 0))
    for param in image.params:
        value = values[param.name] if param.name else next(hidden)
        try:
            struct.pack_into("<" + argument_code(param), buffer, param.offset, value)
        except struct.error as error:
            raise EngineError(f"{image.entry}: {param.name} = {value!r} is no {param.type} ({error})") from None
    return bytes(buffer)


# --- occupancy ------------------------------------------------------------------------------------------------

#: Dynamic shared memory that one block may have, and shared memory of one SM, bytes.
SHARED_LIMIT: Final[dict[int, int]] = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376, 121: 101_376,
}  # fmt: skip
_SHARED_PER_SM: Final[dict[int, int]] = {sm: limit + 1024 for sm, limit in SHARED_LIMIT.items()}
_WARPS_PER_SM: Final[dict[int, int]] = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48, 121: 48}
_BLOCKS_PER_SM: Final[dict[int, int]] = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24, 121: 24}
_REGISTERS_PER_SM, _REGISTER_UNIT, _SYSTEM_SHARED = 65_536, 256, 1024


def occupancy(*, registers: int, shared_bytes: int, num_warps: int, sm: int) -> float:
    """Return resident warps as a share of the most that an SM holds; 0 when a block does not fit.

    Registers are given to warps in units of 256; each block costs 1 KiB of shared memory beside its own.
    """
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS_PER_SM // (per_warp * num_warps)
    by_shared = _SHARED_PER_SM[sm] // (shared_bytes + _SYSTEM_SHARED)
    blocks = min(by_registers, by_shared, _WARPS_PER_SM[sm] // num_warps, _BLOCKS_PER_SM[sm])
    return blocks * num_warps / _WARPS_PER_SM[sm]


# --- files ----------------------------------------------------------------------------------------------------


def to_json(kernels: KernelSet) -> str:
    """Return the text of a descriptor file."""
    return json.dumps(asdict(kernels), indent=1, sort_keys=True) + "\n"


def from_json(text: str, *, where: str) -> KernelSet:
    """Undo `to_json`.

    Raises:
        EngineError: the text is damaged or of another version.
    """
    try:
        raw = parse_json(text)
        if raw["format"] != FORMAT:
            raise EngineError(f"{where}: format {raw['format']}, expected {FORMAT}; compile the kernels again")
        images = {}
        for name, image in raw["images"].items():
            params = tuple(_typed(Param, param) for param in image["params"])
            images[name] = _typed(Image, image | {"params": params, "resources": _typed(Resources, image["resources"])})
            _check_image(images[name])
        return _typed(KernelSet, raw | {"images": images})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{where}: damaged kernel descriptor ({error}); compile the kernels again") from None


_T = TypeVar("_T")
_PLAIN: Final = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}


def _typed(kind: Callable[..., _T], raw: Mapping[str, Any]) -> _T:
    """Make a dataclass of plain values as JSON has them.

    Raises:
        TypeError: a field is unknown, missing, or of another type.
    """
    made = kind(**raw)
    for one in fields(made):  # pyright: ignore[reportArgumentType]
        value, allowed = getattr(made, one.name), _PLAIN.get(str(one.type))
        if allowed is not None and type(value) not in allowed:
            raise TypeError(f"{one.name} is a {type(value).__name__}, expected {one.type}")
    return made


def _check_image(image: Image) -> None:
    """Refuse sizes that no compiled kernel has, and a cubin that is not a file beside the descriptor."""
    fault = name_fault(image.cubin)
    if fault is not None or "/" in image.cubin:
        raise ValueError(f"cubin {fault or f'is {image.cubin!r}, expected a file beside the descriptor'}")
    names = [param.name for param in image.params]
    if names[-2:] != ["", ""] or "" in names[:-2] or len(set(names[:-2])) != len(names) - 2:
        raise ValueError(f"{image.variant} has the parameters {names!r:.200}, expected the last two without names")
    for param in image.params:
        if param.name and not param.type.startswith("*") and param.type not in _CODES:
            raise ValueError(f"parameter {param.name} is a {param.type}, expected {', '.join(_CODES)} or a pointer")
        if not (0 <= param.offset <= _MOST_ARGUMENT_BYTES and 0 < param.size <= 8):
            raise ValueError(f"parameter {param.name} lies at {param.offset} with {param.size} bytes")
    if not 0 < image.driver < 1 << 20:
        raise ValueError(f"driver is {image.driver}, expected a CUDA version such as 13000")
    sizes = (image.num_warps, image.num_ctas, image.scratch_align)
    if min(sizes) < 1 or max(sizes) > 1 << 16 or not 0 <= image.scratch_bytes < 1 << 40:
        raise ValueError(f"{image.variant} has sizes out of range")
    if not 0 <= image.resources.shared_bytes < 1 << 20:
        raise ValueError(f"{image.variant} has shared_bytes {image.resources.shared_bytes}")


def read_kernels(path: Path) -> KernelSet:
    """Read a descriptor and check its operator against this seekforge.

    Raises:
        EngineError: the file is damaged, or made for another version of the operator.
    """
    try:
        text = read_text(path, most=SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EngineError(f"{path}: cannot be read ({reason}); compile the kernels again") from None
    kernels = from_json(text, where=str(path))
    spec = SPECS.get(kernels.op)
    if spec is None or spec.version != kernels.op_version:
        raise EngineError(
            f"{path}: kernels of {kernels.op} version {kernels.op_version}, this seekforge has "
            f"{'no such operator' if spec is None else f'version {spec.version}'}; compile the kernels again"
        )
    return kernels


def read_cubin(path: Path, image: Image) -> bytes:
    """Return the cubin of an image whose descriptor is at `path`.

    Raises:
        EngineError: the file is missing or is not the one that was compiled.
    """
    file = inside(path.parent, image.cubin, error=EngineError, where=path, again="compile the kernels again")
    try:
        cubin = read_bytes(file, most=_MOST_CUBIN_BYTES)
    except FileNotFoundError:
        raise EngineError(f"{file}: missing; copy the whole folder of kernels, or compile them again") from None
    except OSError as error:
        raise EngineError(f"{file}: cannot be read ({error.strerror}); compile the kernels again") from None
    if hashlib.sha256(cubin).hexdigest() != image.sha256:
        raise EngineError(f"{file}: not what was compiled (sha256 differs); compile the kernels again")
    return cubin


def check_plan(plan: LaunchPlan, variants: Sequence[Variant]) -> None:
    """Check that a plan names known variants, gives exactly their arguments, and stays in grid limits. A bug if not."""
    known = {variant.name: variant for variant in variants}
    for launch in plan.launches:
        variant = known[launch.variant]
        assert set(launch.arguments) == set(variant.types), (launch.variant, sorted(launch.arguments))
        x, y, z = launch.grid
        assert 0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536, (launch.variant, launch.grid)
        for name, value in launch.arguments.items():
            assert isinstance(value, Buffer) == variant.types[name].startswith("*"), (launch.variant, name)
            if name in variant.aligned:
                assert isinstance(value, int) and value % 16 == 0, (launch.variant, name, value)
