"""The GPU harness on a pretended device: its memory is the host's, its launches are the interpreter's.

What a GPU would get goes through here: descriptors, launch plans, packed arguments, addresses, workspace.
"""

from __future__ import annotations

import importlib
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import gpu_check
import pytest
import torch
from kernel_cases import fake_kernels
from torch import Tensor

from seekforge.plugins.interpret import POINTERS
from seekforge.plugins.kernel_sizes import WITH_KERNELS
from seekforge.plugins.launch import Image, argument_code, check_plan, op_kernels, pack_arguments, statics_of
from seekforge.plugins.registry import SPECS


class PretendedDevice:
    """A device whose kernels run in Triton's interpreter, from the packed parameter buffer alone."""

    name, sm, stream = "pretended", 90, 7

    def __init__(self, op: str, statics: dict[str, Any]) -> None:
        self.driver = self
        self._memory: dict[int, Tensor] = {}
        self._next = 0x10_0000
        self._functions = importlib.import_module(f"seekforge.plugins.{SPECS[op].torch_name}.kernel")
        self._variants = {v.name: v for v in op_kernels(op).variants(statics, self.sm)}
        self.grids: list[tuple[int, int, int]] = []

    def allocate(self, num_bytes: int) -> int:
        at, self._next = self._next, self._next + -(-num_bytes // 256) * 256 + 4096
        self._memory[at] = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        return at

    def free(self, address: int) -> None:
        del self._memory[address]

    def upload(self, address: int, data: Tensor) -> None:
        if data.numel():
            self._memory[address].copy_(data.reshape(-1).view(torch.uint8))

    def download(self, address: int, data: Tensor) -> None:
        if data.numel():
            data.view(-1).view(torch.uint8).copy_(self._memory[address])

    def seconds(self, call: Callable[[], None], repeats: int) -> float:
        call()
        return 1e-3

    def load(self, image: Image, cubin: bytes) -> Any:
        return image.variant

    def launch(
        self, kernel: Any, image: Image, grid: tuple[int, int, int], values: Sequence[int | float], stream: int
    ) -> None:
        assert stream == self.stream
        self.grids.append(grid)
        named = {p.name: v for p, v in zip(image.params, values, strict=True) if p.name}
        raw = pack_arguments(image, named)
        variant = self._variants[kernel]
        arguments = {}
        for param in image.params[:-2]:
            (value,) = struct.unpack_from("<" + argument_code(param), raw, param.offset)
            arguments[param.name] = self._view(value, param.type) if param.type.startswith("*") else value
        getattr(self._functions, variant.kernel)[grid](**arguments, **variant.constants)

    def _view(self, address: int, kind: str) -> Tensor:
        starts = sorted(self._memory)
        start = starts[bisect_right(starts, address) - 1]
        memory = self._memory[start]
        assert 0 <= address - start <= memory.numel() and address % 16 == 0
        dtype = POINTERS[kind]
        rest = memory[address - start :]
        return rest[: rest.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_a_case_of_every_operator_runs_through_the_harness(op: str) -> None:
    case = next(c for c in gpu_check.tiny_cases() if c.op == op and c.name.startswith(("one-token", "three")))
    statics = statics_of(op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
    device = PretendedDevice(op, statics)
    kernels = fake_kernels(op, statics, device.sm)
    got = gpu_check.run_case(device, kernels, dict.fromkeys(kernels.images, b""), case)
    right, error = gpu_check.judge(case, got, case.expected())
    assert right, error
    assert device.grids
    bent = tuple(t * 1.01 if t.is_floating_point() else t for t in case.expected())
    if op in ("BlockFp8Linear", "DsaAttention", "MoeRoute", "MoeExperts"):
        assert not gpu_check.judge(case, got, bent)[0]


def test_every_real_case_has_a_plan_and_kernels() -> None:
    found = gpu_check.real_cases()
    assert {one.op for one in found} == set(WITH_KERNELS)
    for one in found:
        statics = statics_of(one.op, one.statics)
        for sm in (80, 90, 120):
            assert op_kernels(one.op).variants(statics, sm)
        assert one.num_bytes > 0


def test_a_small_real_case_is_drawn_as_described() -> None:
    for real in (
        gpu_check._route(4),
        gpu_check._write(70),
        gpu_check._linear(2, 256, 128),
        gpu_check._attention(1, 1, 16),
    ):
        case = real.make()
        bound = case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs)
        statics = statics_of(case.op, bound)
        assert statics == real.statics
        check_plan(op_kernels(case.op).plan(bound, 90), op_kernels(case.op).variants(statics, 90))


def test_digests_tell_the_sets_of_kernels_apart() -> None:
    sets = gpu_check.needed(gpu_check.tiny_cases(), gpu_check.real_cases())
    assert len(sets) == len({(op, str(sorted(statics.items()))) for op, statics in sets.values()})
    assert {op for op, _ in sets.values()} == set(WITH_KERNELS)
