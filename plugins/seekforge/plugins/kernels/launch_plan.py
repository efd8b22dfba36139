"""The launches of one operator call as plain values, from the sizes of its tensors.

Everything between `kernel.py` (Triton, build time) and a driver (run time) is a plain value here: no torch, no Triton,
no CUDA. A `LaunchPlan` says which images (`kernel_set`) run in which order on which grid, with arguments that name the
operator's tensors or a place in its workspace. So argument packing and launch plans are tested on a CPU, and the
interpreter runs the very plan that a GPU would.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.constraints import Rule
from seekforge.plugins.kernels.index import kernel_sm
from seekforge.plugins.kernels.sm_limits import SMS
from seekforge.plugins.operator import TRITON, LibraryForm, load
from seekforge.plugins.registry import KERNEL_FORMS, SPECS

#: Name that a `Buffer` uses for the operator's scratch memory.
WORKSPACE: Final = "workspace"
#: Every part of a workspace starts at a multiple of this.
ALIGNMENT: Final = 256
#: Pointers that kernels are compiled for are multiples of this.
POINTER_ALIGNMENT: Final = 16

Scalar = int | float | bool | str


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


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


def library_form(op: str, provider: str) -> LibraryForm | None:
    """Return an operator as a library's kernels; None where the provider is Triton.

    Raises:
        ShapeError: the operator has no kernels, or none of this provider.
    """
    if op not in KERNEL_FORMS:
        raise ShapeError(f"{op}: there are no kernels for it")
    libraries = KERNEL_FORMS[op].libraries
    if provider != TRITON and provider not in libraries:
        raise ShapeError(f"{op}: no kernels of provider {provider[:60]!r}; it has {', '.join((TRITON, *libraries))}")
    return libraries.get(provider)


@functools.cache
def op_kernels(op: str, provider: str = TRITON) -> OpKernels:
    """Return the `launch` module of an operator by its ONNX op_type and the provider of its kernels.

    Raises:
        ShapeError: the operator has no kernels, or none of this provider.
    """
    form = library_form(op, provider)
    return load(KERNEL_FORMS[op].launch if form is None else form.launch)


def workspace_bytes(
    op: str, shapes: Sequence[Sequence[int]], attrs: Mapping[str, Any], sms: Collection[int] = SMS
) -> int:
    """Return the scratch bytes that one operator needs on the greediest of several GPUs, whoever provides its kernels.

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
    sizes = dict(bound)
    most = max(op_kernels(op).workspace_bytes(sizes, sm) for sm in sms)
    for provider in KERNEL_FORMS[op].libraries:
        kernels = op_kernels(op, provider)
        try:
            kernels.check({name: sizes[name] for name in kernels.STATICS})
        except ShapeError:
            continue  # no such kernels for these sizes
        most = max(most, *(kernels.workspace_bytes(sizes, sm) for sm in sms))
    return most


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


def statics_of(op: str, bound: Mapping[str, Any], provider: str = TRITON) -> dict[str, Scalar]:
    """Return the compile-time values of an operator, checked.

    Args:
        op: ONNX op_type.
        bound: sizes and attributes, at least the static ones.
        provider: who provides the kernels, Triton or a library.

    Raises:
        ShapeError: there are no kernels for them; says what there is.
    """
    module = op_kernels(op, provider)
    statics = {name: bound[name] for name in module.STATICS}
    module.check(statics)
    return statics


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
