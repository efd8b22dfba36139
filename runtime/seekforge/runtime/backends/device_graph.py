"""One graph of a GPU engine: its plans, what they read and write in device memory, and the buckets of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from seekforge.plugins.errors import EngineError
from seekforge.plugins.formats.dtypes import NUMPY, itemsize
from seekforge.plugins.formats.program import GraphIO, TensorSpec
from seekforge.runtime.backends.base import StepInputs
from seekforge.runtime.backends.device import Device, Plan

#: Roles of the inputs that every step gives, and of all that lies in buffers of its own.
_GIVEN: Final = ("token", "bookkeeping")
_IN_BUFFERS: Final = (*_GIVEN, "result", "tap", "handover")

#: Smallest, typical and largest shape.
Bound = tuple[tuple[int, ...], ...]
#: Profile -> plan -> input -> shapes, as `Manifest.profiles` has them.
Profiles = Mapping[str, Mapping[str, Mapping[str, Bound]]]


def next_power_of_two(value: int, most: int) -> int:
    """Return the least power of two that is at least `value`, but at most `most` (which is at least `value`)."""
    return min(1 << (value - 1).bit_length(), most)


def padded(inputs: StepInputs, *, max_batch_size: int, max_blocks: int) -> StepInputs:
    """Return a step of a bucket's shape: rows, table columns and logits rows that nobody reads are added.

    Padding rows have token 0 at position 0 and slot −1: they change no cache.
    """
    rows, width = inputs.input_ids.shape
    more = next_power_of_two(rows, max(max_batch_size, rows)) - rows
    columns = inputs.block_table.shape[1]
    wider = next_power_of_two(columns, max(max_blocks, columns)) - columns
    count = len(inputs.logits_index)
    longer = next_power_of_two(count, max(max_batch_size * width, count)) - count
    down = ((0, more), (0, 0))
    return StepInputs(
        np.pad(inputs.input_ids, down),
        np.pad(inputs.positions, down),
        np.pad(inputs.slot_mapping, down, constant_values=-1),
        np.pad(inputs.block_table, ((0, more), (0, wider))),
        np.pad(inputs.logits_index, (0, longer)),
        None if inputs.hidden_in is None else np.pad(inputs.hidden_in, (*down, (0, 0))),
        {name: np.pad(value, (*down, (0, 0))) for name, value in inputs.given.items()},
    )


def halves(inputs: StepInputs) -> list[tuple[StepInputs, np.ndarray]]:
    """Return the upper and the lower rows of a step as two steps, each with the logits rows of the whole that it gives.

    A half that gives none asks for its first row all the same, which a step must.
    """
    rows, width = inputs.input_ids.shape
    middle = rows // 2
    found = []
    for start, stop in ((0, middle), (middle, rows)):
        of_row = inputs.logits_index // width
        wanted = np.nonzero((of_row >= start) & (of_row < stop))[0]
        picked = inputs.logits_index[wanted] - start * width
        part = StepInputs(
            inputs.input_ids[start:stop],
            inputs.positions[start:stop],
            inputs.slot_mapping[start:stop],
            inputs.block_table[start:stop],
            picked if len(picked) else np.zeros(1, np.int64),
            None if inputs.hidden_in is None else inputs.hidden_in[start:stop],
            {name: value[start:stop] for name, value in inputs.given.items()},
        )
        found.append((part, wanted))
    return found


class Buffer:
    """Device memory that grows."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.address = 0
        self.num_bytes = 0
        self._bound: dict[tuple[int, str], int] = {}

    def reserve(self, num_bytes: int) -> None:
        """Make room."""
        if num_bytes > self.num_bytes:
            if self.address:
                self._device.free(self.address)
                self.address = self.num_bytes = 0
            self.address = self._device.allocate(num_bytes)
            self.num_bytes = num_bytes

    def bind(self, plan: Plan, name: str) -> bool:
        """Say to a plan that its tensor `name` lies here; returns whether it lay elsewhere before."""
        key = (id(plan), name)
        if self._bound.get(key) == self.address:
            return False
        plan.set_address(name, self.address)
        self._bound[key] = self.address
        return True


class DeviceGraph:
    """A graph's plans, which a step runs one after the other, with the memory of their inputs and outputs.

    Args:
        folder: the engine.
        name: of the graph.
        face: of the whole graph.
        plans: faces of the plans, in order; values called `handover_out.N` of one are `handover.N` of a later one.
        profiles: of the manifest.
        device: where they run.
        constants: name of a weight or table -> its address.

    Raises:
        EngineError: a plan cannot be loaded, or is not what the manifest says.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        face: GraphIO,
        plans: Sequence[GraphIO],
        profiles: Profiles,
        device: Device,
        constants: Mapping[str, int],
    ) -> None:
        self.name, self.face, self.device = name, face, device
        self._plans = [(_open(folder, one, device), one) for one in plans]
        self._bounds = [step_bounds(profile, plans) for profile in profiles.values()]
        self.debug = frozenset(spec.name for spec in face.outputs if spec.role == "debug")
        self.buffers: dict[str, Buffer] = {}
        # what a step looks at: a handful of tensors among the weights of a plan
        self._moving = [(plan, *_moving(one)) for plan, one in self._plans]
        self._given = [spec for spec in face.inputs if spec.role in _GIVEN]
        for plan, one in self._plans:
            for spec in (*one.inputs, *one.outputs):
                if spec.role in _IN_BUFFERS:
                    self.buffers.setdefault(_place(spec), Buffer(device))
                elif spec.role in ("weight", "table"):
                    plan.set_shape(spec.name, tuple(int(dim) for dim in spec.shape))
                    plan.set_address(spec.name, constants[spec.name])

    def set_caches(self, caches: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        """Say where the caches lie: name -> address and shape."""
        for plan, one in self._plans:
            for spec in one.with_role("cache"):
                address, shape = caches[spec.name]
                plan.set_shape(spec.name, shape)
                plan.set_address(spec.name, address)
            for output, source in one.aliases.items():
                plan.set_address(output, caches[source][0])

    def place(self, inputs: StepInputs) -> tuple[bool, dict[str, tuple[int, ...]]]:
        """Make room for a step of this shape; returns whether an address changed, and the shapes of the outputs."""
        sizes = {"B": inputs.input_ids.shape[0], "Q": inputs.input_ids.shape[1], "N": len(inputs.logits_index)}
        moved = False
        shapes: dict[str, tuple[int, ...]] = {}
        for plan, given, taken, made in self._moving:
            for spec in given:
                moved |= self._reserve(plan, spec, inputs.array(spec.name).shape)
            for spec in taken:  # written by an earlier plan, which has made room
                moved |= self.buffers[_place(spec)].bind(plan, spec.name)
            for spec in made:
                shapes[spec.name] = tuple(_size(dim, sizes) for dim in spec.shape)
                moved |= self._reserve(plan, spec, shapes[spec.name])
        return moved, shapes

    def profile_of(self, inputs: StepInputs) -> int | None:
        """Return the number of the first profile that takes a step of this shape, or None."""
        if not self._bounds:
            return 0
        for number, bounds in enumerate(self._bounds):
            if all(fits(inputs.array(name).shape, bound) for name, bound in bounds.items()):
                return number
        return None

    def use_profile(self, number: int) -> None:
        """Choose the profile of the next step; before its shapes are set."""
        for plan, _ in self._plans:
            plan.use_profile(number)

    def set_shapes(self, inputs: StepInputs) -> None:
        """Tell the plans the shapes of a step's inputs."""
        sizes = {"B": inputs.input_ids.shape[0], "Q": inputs.input_ids.shape[1]}
        for plan, given, taken, _ in self._moving:
            for spec in given:
                plan.set_shape(spec.name, inputs.array(spec.name).shape)
            for spec in taken:
                plan.set_shape(spec.name, tuple(_size(dim, sizes) for dim in spec.shape))

    def upload(self, inputs: StepInputs) -> None:
        """Copy a step's inputs to the device."""
        for spec in self._given:
            array = np.ascontiguousarray(inputs.array(spec.name), NUMPY[spec.dtype])
            self.device.upload(self.buffers[spec.name].address, array)

    def enqueue(self) -> None:
        """Start the step."""
        for plan, _ in self._plans:
            plan.enqueue()

    def watch(self, names: Collection[str], seen: Callable[[str, np.ndarray], None]) -> None:
        """Have `seen` called with these debug tensors in the steps to come, and with no other."""
        for plan, one in self._plans:
            debug = [spec.name for spec in one.outputs if spec.role == "debug"]
            if debug:
                plan.watch([name for name in debug if name in names], seen)

    def _reserve(self, plan: Plan, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
        buffer = self.buffers[_place(spec)]
        buffer.reserve(max(math.prod(shape), 1) * itemsize(spec.dtype))
        return buffer.bind(plan, spec.name)


def _moving(face: GraphIO) -> tuple[list[TensorSpec], list[TensorSpec], list[TensorSpec]]:
    """Return what changes its shape from step to step: inputs that are given, handovers taken, and what is made."""
    given = [spec for spec in face.inputs if spec.role in _GIVEN]
    made = [spec for spec in face.outputs if spec.role in _IN_BUFFERS]
    return given, face.with_role("handover"), made


def step_bounds(profile: Mapping[str, Mapping[str, Bound]], plans: Sequence[GraphIO]) -> dict[str, Bound]:
    """Return the bounds that one profile sets to the inputs that every step gives."""
    bounds: dict[str, Bound] = {}
    for face in plans:
        given = {spec.name for spec in face.inputs if spec.role in _GIVEN}
        of_plan = profile.get(Path(face.file).stem, {})
        bounds |= {name: bound for name, bound in of_plan.items() if name in given}
    return bounds


def fits(shape: tuple[int, ...], bound: Bound) -> bool:
    """Return whether a shape lies within (smallest, typical, largest)."""
    return all(low <= size <= high for low, size, high in zip(bound[0], shape, bound[2], strict=True))


def _open(folder: Path, face: GraphIO, device: Device) -> Plan:
    plan = device.open_plan(folder / face.file)
    wanted = {spec.name for spec in (*face.inputs, *face.outputs) if spec.role != "debug"}
    found = set(plan.names())
    if wanted != found:
        odd = sorted(wanted ^ found)[0]
        raise EngineError(
            f"{folder / face.file}: {odd} is only in {'the plan' if odd in found else 'the manifest'}; "
            "build the engine again"
        )
    return plan


def _place(spec: TensorSpec) -> str:
    """Name of a tensor's buffer: both ends of a handover have one."""
    return spec.name.replace("handover_out.", "handover.") if spec.role == "handover" else spec.name


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """Return an axis; "B*Q" is a product."""
    return dim if isinstance(dim, int) else math.prod(sizes[part] for part in dim.split("*"))
