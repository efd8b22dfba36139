"""One graph of a GPU engine: its stages, what they read and write in device memory, and the buckets of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from seekforge.common.dtypes import NUMPY, itemsize
from seekforge.common.errors import EngineError
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.step_io import StepInputs
from seekforge.runtime.backends.tensorrt.device import Bound, Call, Device, Plan

#: Roles of the inputs that every step gives, and of all that lies in buffers of its own.
_GIVEN: Final = ("token", "bookkeeping")
_IN_BUFFERS: Final = (*_GIVEN, "result", "tap", "intermediate")

#: Buffer of the n-th tap of every stage, while nobody looks at it.
_UNREAD: Final = "unread.{}"

#: Profile -> plan -> input -> shapes, as `Manifest.profiles` has them.
Profiles = Mapping[str, Mapping[str, Mapping[str, Bound]]]


class Buffer:
    """Device memory that grows."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address = 0
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> bool:
        """Make room; returns whether the memory lies elsewhere now."""
        if num_bytes <= self.num_bytes:
            return False
        if self.address:
            self._device.free(self.address)
            self.address = self.num_bytes = 0
        self.address = self._device.allocate(num_bytes)
        self.num_bytes = num_bytes
        return True


class Stage:
    """One run of a plan within a step.

    Args:
        plan: the plan that runs it; it may run other stages as well.
        graph_io: what the stage reads and gives, by the names of the step.
        names: name in the step -> name in the plan.
    """

    def __init__(self, plan: Plan, graph_io: GraphIO, names: Mapping[str, str]) -> None:
        self.plan, self.graph_io, self.names = plan, graph_io, names
        self.call = Call()
        # what a step looks at: a handful of tensors among the weights
        self.given = [spec for spec in graph_io.inputs if spec.role in _GIVEN]
        self.taken = graph_io.with_role("intermediate")
        self.made = [spec for spec in graph_io.outputs if spec.role in _IN_BUFFERS]
        self.taps = {spec.name: _UNREAD.format(i) for i, spec in enumerate(_of_role(graph_io.outputs, "tap"))}
        self._debug = {names[spec.name]: spec.name for spec in graph_io.outputs if spec.role == "debug"}

    def place(self, spec: TensorSpec, shown: Collection[str]) -> str:
        """Name of a tensor's buffer: both ends of an intermediate have one, all taps that nobody looks at another."""
        if spec.role == "intermediate":
            return spec.name.replace("intermediate_out.", "intermediate.")
        return spec.name if spec.name in shown else self.taps.get(spec.name, spec.name)

    def set_address(self, name: str, address: int) -> None:
        """Say where a tensor lies."""
        self.call.addresses[self.names[name]] = address

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input."""
        self.call.shapes[self.names[name]] = shape

    def watch(self, wanted: Collection[str], seen: Callable[[str, np.ndarray], None]) -> None:
        """Have `seen` called with those of its debug tensors that are wanted."""
        debug_names = self._debug
        self.call.watched = frozenset(inner for inner, name in debug_names.items() if name in wanted)
        self.call.seen = lambda inner, value: seen(debug_names[inner], value)

    def enqueue(self) -> None:
        """Start it."""
        self.plan.enqueue(self.call)


class DeviceGraph:
    """A graph's stages, which a step runs one after the other, with the memory of their inputs and outputs.

    Args:
        folder: the engine.
        name: the name of the graph.
        graph_io: inputs and outputs of the whole graph.
        stages: inputs and outputs of the stages, in order; `intermediate_out.N` of one is `intermediate.N` of a later
            one. Those of one file are run by one plan.
        profiles: the profiles of the manifest.
        device: the device on which they run.
        constants: name of a weight or table -> its address.
        capturable: whether steps can be captured in a CUDA graph, as far as the build knew.
        plans: all plans of the graph, where other devices run the others: their profiles bound a step too.
        received: what comes from another device before each step, `intermediate.N`.

    Raises:
        EngineError: a plan cannot be loaded, or is not what the manifest says.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        graph_io: GraphIO,
        stages: Sequence[GraphIO],
        profiles: Profiles,
        device: Device,
        constants: Mapping[str, int],
        *,
        capturable: bool = True,
        plans: Sequence[GraphIO] = (),
        received: Sequence[TensorSpec] = (),
    ) -> None:
        self._received = received
        self.name, self.graph_io, self.device, self.capturable = name, graph_io, device, capturable
        self._stages = _open(folder, stages, device, profiles)
        self._bounds = [step_bounds(profile, plans or stages) for profile in profiles.values()]
        self.debug = frozenset(spec.name for spec in graph_io.outputs if spec.role == "debug")
        self.buffers: dict[str, Buffer] = {}
        self._given = [spec for spec in graph_io.inputs if spec.role in _GIVEN]
        self.dtypes = {spec.name: NUMPY[spec.dtype] for spec in graph_io.outputs}
        self.taps = frozenset(spec.name for spec in _of_role(graph_io.outputs, "tap"))
        for spec in received:
            self.buffers[spec.name] = Buffer(device)
            self.dtypes[spec.name] = NUMPY[spec.dtype]
        self._placed: tuple[object, ...] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        for stage in self._stages:
            for spec in (*stage.graph_io.inputs, *stage.graph_io.outputs):
                if spec.role in _IN_BUFFERS:
                    for name in (stage.place(spec, ()), stage.place(spec, self.taps)):
                        self.buffers.setdefault(name, Buffer(device))
                elif spec.role in ("weight", "table"):
                    stage.set_shape(spec.name, tuple(int(dim) for dim in spec.shape))
                    stage.set_address(spec.name, constants[spec.name])

    def set_caches(self, caches: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        """Say where the caches lie: name -> address and shape."""
        for stage in self._stages:
            for spec in stage.graph_io.with_role("cache"):
                address, shape = caches[spec.name]
                stage.set_shape(spec.name, shape)
                stage.set_address(spec.name, address)
            for output, source in stage.graph_io.aliases.items():
                stage.set_address(output, caches[source][0])

    def place(self, inputs: StepInputs, shown: frozenset[str]) -> tuple[bool, dict[str, tuple[int, ...]]]:
        """Make room for a step of this shape and tell the stages; for one like the last there is nothing to do.

        Args:
            inputs: the inputs of the step.
            shown: taps that will be fetched. Of 61 layers all others lie in one place, each until the next is written.

        Returns:
            Whether memory moved, so that captured graphs are void, and the shapes of the outputs.
        """
        shapes = {spec.name: inputs.array(spec.name).shape for spec in self._given}
        step = (*shapes.values(), shown)
        if step == self._placed:
            return False, self._shapes
        sizes = {"B": inputs.input_ids.shape[0], "Q": inputs.input_ids.shape[1], "N": len(inputs.logits_index)}
        for stage in self._stages:
            for spec in (*stage.taken, *stage.made):
                shapes[spec.name] = tuple(_size(dim, sizes) for dim in spec.shape)
        for spec in self._received:
            shapes[spec.name] = tuple(_size(dim, sizes) for dim in spec.shape)
        moved, self._placed = False, None  # until all is done: there may not be enough memory
        for spec in self._received:
            moved |= self.buffers[spec.name].reserve(max(math.prod(shapes[spec.name]), 1) * itemsize(spec.dtype))
        for stage in self._stages:
            for spec in (*stage.given, *stage.made):
                room = max(math.prod(shapes[spec.name]), 1) * itemsize(spec.dtype)
                moved |= self.buffers[stage.place(spec, shown)].reserve(room)
        for stage in self._stages:  # all have their room: only now is it known where each tensor lies
            for spec in (*stage.given, *stage.taken, *stage.made):
                stage.set_address(spec.name, self.buffers[stage.place(spec, shown)].address)
            for spec in (*stage.given, *stage.taken):
                stage.set_shape(spec.name, shapes[spec.name])
        self._placed, self._shapes = step, shapes
        return moved, shapes

    def profile_of(self, inputs: StepInputs) -> int | None:
        """Return the number of the first profile that takes a step of this shape, or None."""
        if not self._bounds:
            return 0
        for number, bounds in enumerate(self._bounds):
            if all(fits(inputs.array(name).shape, bound) for name, bound in bounds.items()):
                return number
        return None

    def use(self, profile: int, context: int, *, specialized: bool) -> None:
        """Choose the profile and the execution contexts of the next step; see `Call`."""
        for stage in self._stages:
            stage.call.profile, stage.call.context, stage.call.specialized = profile, context, specialized

    def upload(self, inputs: StepInputs) -> None:
        """Copy a step's inputs to the device."""
        for spec in self._given:
            array = np.ascontiguousarray(inputs.array(spec.name), NUMPY[spec.dtype])
            self.device.upload(self.buffers[spec.name].address, array)
        for spec in self._received:
            array = inputs.intermediate_tensors[spec.name]
            if array.shape != self._shapes[spec.name]:
                raise EngineError(
                    f"{spec.name} comes as {list(array.shape)} from the stage before, expected "
                    f"{list(self._shapes[spec.name])}: they are not in the same step; start the engine again"
                )
            self.device.upload(self.buffers[spec.name].address, np.ascontiguousarray(array, NUMPY[spec.dtype]))

    def handed_on(self, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
        """Return what the next stage takes after a step: `intermediate.N` -> its value, in the dtype of the plans."""
        values: dict[str, np.ndarray] = {}
        for spec in specs:
            shape = self._shapes.get(
                spec.name.replace("intermediate.", "intermediate_out."), self._shapes.get(spec.name)
            )
            assert shape is not None
            values[spec.name] = np.empty(shape, NUMPY[spec.dtype])
            self.device.download(values[spec.name], self.buffers[spec.name].address)
        return values

    def enqueue(self) -> None:
        """Start the step."""
        for stage in self._stages:
            stage.enqueue()

    def is_stream_capturable(self) -> bool:
        """Return whether every plan says that the step, which was enqueued just now, can be captured."""
        return all(stage.plan.is_stream_capturable(stage.call) for stage in self._stages)

    def release(self, context: int) -> None:
        """Give back the execution contexts of a number."""
        for plan in {id(stage.plan): stage.plan for stage in self._stages}.values():
            plan.release(context)

    def watch(self, names: Collection[str], seen: Callable[[str, np.ndarray], None]) -> None:
        """Have `seen` called with these debug tensors in the steps to come, and with no other."""
        for stage in self._stages:
            stage.watch(names, seen)


def step_bounds(profile: Mapping[str, Mapping[str, Bound]], plans: Sequence[GraphIO]) -> dict[str, Bound]:
    """Return the bounds that one profile sets to the inputs that every step gives."""
    bounds: dict[str, Bound] = {}
    for graph_io in plans:
        step_names = {spec.name for spec in graph_io.inputs if spec.role in _GIVEN}
        of_plan = profile.get(Path(graph_io.file).stem, {})
        bounds |= {name: bound for name, bound in of_plan.items() if name in step_names}
    return bounds


def fits(shape: tuple[int, ...], bound: Bound) -> bool:
    """Return whether a shape lies within (smallest, typical, largest)."""
    return all(low <= size <= high for low, size, high in zip(bound[0], shape, bound[2], strict=True))


def _open(folder: Path, graph_ios: Sequence[GraphIO], device: Device, profiles: Profiles) -> list[Stage]:
    """Load each plan once and say what its tensors are called in every stage that it runs."""
    plans: dict[str, tuple[Plan, GraphIO]] = {}
    stages = []
    for graph_io in graph_ios:
        path = folder / graph_io.file
        if graph_io.file not in plans:
            plan = device.open_plan(path)
            wanted = {spec.name for spec in _tensors(graph_io) if spec.role != "debug"}
            odd = sorted(wanted.symmetric_difference(plan.names()))
            if odd:
                raise EngineError(
                    f"{path}: {odd[0]} is only in {'the manifest' if odd[0] in wanted else 'the plan'}; "
                    "build the engine again"
                )
            _check_shapes(path, plan, graph_io, profiles)
            _check_aliases(path, graph_io, plan.aliases())
            plans[graph_io.file] = plan, graph_io
        plan, first = plans[graph_io.file]
        if [_kind(spec) for spec in _tensors(first)] != [_kind(spec) for spec in _tensors(graph_io)]:
            raise EngineError(f"{path}: the stages that it runs are not alike; build the engine again")
        names = {spec.name: inner.name for spec, inner in zip(_tensors(graph_io), _tensors(first), strict=True)}
        stages.append(Stage(plan, graph_io, names))
    return stages


def _check_shapes(path: Path, plan: Plan, graph_io: GraphIO, profiles: Profiles) -> None:
    """Hold the shapes and profiles of the manifest against those of a plan."""
    shapes = plan.shapes()
    for spec in _tensors(graph_io):
        plan_shape = shapes.get(spec.name, spec.shape)  # TensorRT need not know a size that the graph fixes
        known = [
            (declared, compiled)
            for declared, compiled in zip(spec.shape, plan_shape)
            if isinstance(declared, int) and compiled != -1
        ]
        if len(plan_shape) != len(spec.shape) or any(declared != compiled for declared, compiled in known):
            raise EngineError(
                f"{path}: {spec.name} has the shape {list(plan_shape)} in the plan and {list(spec.shape)} in the "
                "manifest; build the engine again"
            )
    bounds = plan.bounds()
    if profiles and bounds and len(bounds) != len(profiles):
        raise EngineError(f"{path}: has {len(bounds)} profiles, the manifest {len(profiles)}; build the engine again")
    for (label, by_plan), of_plan in zip(profiles.items(), bounds):
        for name, said in by_plan.get(Path(graph_io.file).stem, {}).items():
            if name in of_plan and of_plan[name] != said:
                raise EngineError(
                    f"{path}: profile {label} takes {name} of {of_plan[name]}, the manifest says {said}; "
                    "build the engine again"
                )


def _check_aliases(path: Path, graph_io: GraphIO, told: Mapping[str, str]) -> None:
    """Refuse a plan whose outputs share memory with other inputs than the manifest says.

    Of outputs that a plugin aliases the library may tell nothing (TensorRT 11.2 does not): these are taken on trust.
    """
    for output in sorted(told.keys() | graph_io.aliases.keys()):
        wanted, told_alias = graph_io.aliases.get(output), told.get(output)
        if told_alias is not None and told_alias != wanted:
            raise EngineError(
                f"{path}: {output} shares its memory with {told_alias}, the manifest says with {wanted or 'none'}; "
                "build the engine again"
            )
        if wanted is not None:
            output_spec, input_spec = (
                next(one for one in _tensors(graph_io) if one.name == name) for name in (output, wanted)
            )
            if output_spec.dtype != input_spec.dtype or not _may_be_equal(output_spec.shape, input_spec.shape):
                raise EngineError(
                    f"{path}: {output} shares its memory with {wanted}, but is {output_spec.dtype} "
                    f"{list(output_spec.shape)} and not {input_spec.dtype} "
                    f"{list(input_spec.shape)}; build the engine again"
                )


def _may_be_equal(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    return len(one) == len(other) and all(a == b or str in (type(a), type(b)) for a, b in zip(one, other, strict=True))


def _tensors(graph_io: GraphIO) -> tuple[TensorSpec, ...]:
    return (*graph_io.inputs, *graph_io.outputs)


def _kind(spec: TensorSpec) -> tuple[object, ...]:
    return spec.dtype, spec.shape, spec.role


def _of_role(specs: Sequence[TensorSpec], role: str) -> list[TensorSpec]:
    return [spec for spec in specs if spec.role == role]


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """Return an axis; "B*Q" is a product."""
    return dim if isinstance(dim, int) else math.prod(sizes[part] for part in dim.split("*"))
