"""A pretended GPU: its memory is the host's, its kernels run in Triton's interpreter, from packed arguments alone.

A kernel's "cubin" is a JSON text that names the device function and its compile-time values; descriptors, launch plans,
argument packing, addresses, aliases and workspace are those of a real run. Every buffer is filled with 0xFF (NaN in
every floating type) and has a guard behind it, so a write past the end is noticed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from tests.support.kernel_cases import copy_parameters, fake_kernels
from torch import Tensor

from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import INDEX, INDEX_FORMAT, KERNELS
from seekforge.plugins.kernels.interpreter import POINTERS, POISON
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, argument_code, to_json
from seekforge.plugins.kernels.launch_plan import POINTER_ALIGNMENT, op_kernels, statics_of
from seekforge.plugins.registry import SPECS

_ALIGNMENT, _GUARD = 256, 256
#: Any number that is no address: launches must carry it unchanged.
STREAM: Final = 0x5EEC


def host_kernels(op: str, statics: Mapping[str, Any], sm: int) -> tuple[KernelSet, dict[str, bytes]]:
    """Return a descriptor and the cubins that `HostDriver` runs."""
    variants = {variant.name: variant for variant in op_kernels(op).variants(statics, sm)}
    kernels = fake_kernels(op, statics, sm)
    images, cubins = {}, {}
    for name, image in kernels.images.items():
        module = f"seekforge.plugins.{SPECS[op].torch_name}.kernel"
        text = json.dumps([module, variants[name].kernel, dict(variants[name].constants)]).encode()
        cubins[name] = text
        sha256 = hashlib.sha256(text).hexdigest()
        images[name] = replace(image, cubin=f"{sha256[:20]}.cubin", sha256=sha256)
    return replace(kernels, images=images, digest=aot.set_digest(op, statics)), cubins


def write_host_kernels(engine: Path, ops: Mapping[str, Mapping[str, Any]], sm: int) -> dict[str, str]:
    """Write the kernels of an engine folder as a build would, for `HostDriver`; returns op_type -> digest.

    Args:
        engine: the folder; kernels go into `kernels/`.
        ops: op_type -> sizes and attributes, as `kernel_sizes.operators` gives them.
        sm: whose plans and variants.
    """
    folder = engine / KERNELS
    folder.mkdir(parents=True)
    entries = []
    for op, bound in ops.items():
        kernels, cubins = host_kernels(op, statics_of(op, bound), sm)
        file = f"{op}.json"
        (folder / file).write_text(to_json(kernels), encoding="utf-8")
        for name, image in kernels.images.items():
            (folder / image.cubin).write_bytes(cubins[name])
        entries.append({"op": op, "sm": sm, "digest": kernels.digest, "file": file})
    (folder / INDEX).write_text(json.dumps({"format": INDEX_FORMAT, "kernels": entries}), encoding="utf-8")
    return {entry["op"]: entry["digest"] for entry in entries}


class HostDriver:
    """A `launcher.Driver` that interprets. Addresses are those of host memory.

    Attributes:
        memory: start -> bytes of the buffers that a launch may use.
        launches: (entry, grid) of all launches so far.
    """

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}
        self.launches: list[tuple[str, tuple[int, int, int]]] = []

    def load(self, image: Image, cubin: bytes) -> Any:
        """Return the device function and its compile-time values."""
        module, function, constants = json.loads(cubin)
        return getattr(importlib.import_module(module), function), constants

    def prepare(self, kernel: Any, image: Image, grid: tuple[int, int, int], parameters: int) -> Any:
        """Keep what a launch takes."""
        return kernel, image, grid, parameters

    def launch(self, prepared: Sequence[Any], stream: int) -> None:
        """Run one after the other."""
        assert stream == STREAM
        for one in prepared:
            self._run(*one)

    def _run(self, kernel: Any, image: Image, grid: tuple[int, int, int], parameters: int) -> None:
        """Copy the parameters as a driver does, read them back from the raw buffer, and run."""
        function, constants = kernel
        self.launches.append((image.entry, grid))
        raw = copy_parameters(image, parameters)
        arguments = {}
        for param in image.params[:-2]:
            (value,) = struct.unpack_from("<" + argument_code(param), raw, param.offset)
            arguments[param.name] = self._pointer(value, param.type) if param.type.startswith("*") else value
        function[grid](**arguments, **constants)

    def _pointer(self, address: int, kind: str) -> Tensor:
        """Return a tensor of one element at `address`: the interpreter takes its address and reads on from there."""
        starts = sorted(self.memory)
        start = starts[bisect_right(starts, address) - 1] if starts else 0
        inside = starts and start <= address <= start + self.memory[start]
        assert inside and address % POINTER_ALIGNMENT == 0, f"{address:#x} is in no buffer, or not aligned"
        one = (ctypes.c_uint8 * 8).from_address(address)
        return torch.frombuffer(one, dtype=torch.uint8).view(POINTERS[kind])


def guarded(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a poisoned, aligned tensor with a guard behind it, in a buffer of its own."""
    size = math.prod(shape) * dtype.itemsize
    whole = torch.full((size + _ALIGNMENT + _GUARD,), POISON, dtype=torch.uint8)
    start = -whole.data_ptr() % _ALIGNMENT
    return whole[start : start + size].view(dtype).view(*shape)


def check_guard(tensor: Tensor) -> None:
    """Assert that nothing was written behind a tensor of `guarded`."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    behind = whole[tensor.storage_offset() * tensor.element_size() + tensor.nbytes :]
    assert bool((behind == POISON).all()), f"written past the end of a buffer of {tensor.nbytes} bytes"


class HostDevice:
    """A `gpu_device.Device` on the host."""

    name, stream = "interpreter", STREAM

    def __init__(self, sm: int = 90, *, l2_bytes: int = 0, memory_bytes: int = 1 << 40, seconds: float = 1e-3) -> None:
        self.sm, self.driver, self.l2_bytes = sm, HostDriver(), l2_bytes
        self._buffers: dict[int, Tensor] = {}
        self._memory_bytes, self._seconds = memory_bytes, seconds
        self.timed: list[int] = []

    def allocate(self, num_bytes: int) -> int:
        """Return the address of a new buffer."""
        buffer = guarded((max(num_bytes, 1),), torch.uint8)  # an empty tensor would have no address of its own
        address = buffer.data_ptr()
        self._buffers[address] = buffer
        self.driver.memory[address] = num_bytes
        return address

    def free(self, address: int) -> None:
        """Give it back."""
        check_guard(self._buffers[address])
        del self._buffers[address], self.driver.memory[address]

    def upload(self, address: int, data: Tensor) -> None:
        """Copy a tensor into a buffer."""
        if data.numel():
            self._buffers[address][: data.nbytes].copy_(data.reshape(-1).view(torch.uint8))

    def download(self, address: int, data: Tensor) -> None:
        """Copy a buffer into a tensor."""
        check_guard(self._buffers[address])
        if data.numel():
            data.view(-1).view(torch.uint8).copy_(self._buffers[address][: data.nbytes])

    def copy(self, to: int, address: int, num_bytes: int) -> None:
        """Copy between buffers."""
        self._buffers[to][:num_bytes].copy_(self._buffers[address][:num_bytes])

    def free_bytes(self) -> int:
        """Return what the pretended memory has left."""
        return self._memory_bytes - sum(buffer.nbytes for buffer in self._buffers.values())

    def seconds(self, calls: Sequence[Callable[[], None]], repeats: int) -> float:
        """Run each once, note how many they were, and say that one took as long as was asked (a millisecond)."""
        for call in calls:
            call()
        self.timed.append(len(calls))
        return self._seconds
