"""The compiled kernels on a GPU: right, then a whole program, then how fast. `make gpu-check` runs all of it.

    python -m tests.gpu.check compile FOLDER --sm 90     on any machine with triton: kernels and programs of all below
    python -m tests.gpu.check run FOLDER --only tiny     every operator's vectors, compared with the reference
    python -m tests.gpu.check walk FOLDER                whole steps through plugins, eager and as a CUDA graph
    python -m tests.gpu.check run FOLDER --only real     DeepSeek-V3.2's shapes: compared, timed, the benchmark table

`run` needs a CUDA driver, cuda-core and torch (with a CPU build no product is measured as a roof); `walk` needs torch
with CUDA. Neither needs triton or TensorRT. Each operator call goes through the very `OpLauncher.enqueue` that a plugin
calls: launch descriptors, argument packing, workspace. Outputs and workspace are poisoned first. Calls are timed on
buffers in turns, so that nothing is in L2. Exit code 1 when a result is wrong or faster than the GPU can be. Tiny cases
are small enough for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tests.gpu.cases import Real, judged_part, real_cases, tiny_cases
from tests.gpu.device import CudaDevice, Device
from tests.gpu.judge import judge
from tests.gpu.table import (
    Result,
    Roof,
    copies_for,
    line,
    markdown,
    measure_copy,
    measure_products,
    settled,
    timed,
    write_report,
)
from tests.gpu.walk import MODELS, prepare_model, walk_models
from tests.gpu.work import work_of
from torch import Tensor

from seekforge.common.errors import EnvironmentFault, SeekforgeError
from seekforge.plugins.kernels import aot
from seekforge.plugins.kernels.index import kernel_sm
from seekforge.plugins.kernels.interpreter import POISON
from seekforge.plugins.kernels.kernel_set import KernelSet, read_cubin, read_kernels
from seekforge.plugins.kernels.launch_plan import statics_of
from seekforge.plugins.kernels.launcher import OpLauncher
from seekforge.plugins.kernels.providers.choice import provider_fault, providers_of
from seekforge.plugins.operator import TRITON
from seekforge.plugins.testing import Case
from seekforge.plugins.torch_ops import DTYPE_NAMES, TORCH_DTYPES

#: Folder of the operators' kernels, and of the programs to walk, in that of `compile`.
OPERATORS, PROGRAMS = "operators", "programs"


def run_case(device: Device, kernels: KernelSet, cubins: dict[str, bytes], case: Case) -> tuple[Tensor, ...]:
    """Return what the kernels compute for a case."""
    return _Call(device, kernels, cubins, case).results()


class _Call:
    """One operator call with its tensors in device memory."""

    def __init__(self, device: Device, kernels: KernelSet, cubins: dict[str, bytes], case: Case) -> None:
        self.device, spec = device, case.spec
        self.sizes: dict[int, int] = {}
        self.launcher = OpLauncher(kernels, case.attrs, cubins, device.driver)
        self.shapes = [tuple(t.shape) for t in case.inputs]
        bound = spec.bind(self.shapes, case.attrs)
        kinds = {name: DTYPE_NAMES[t.dtype] for name, t in spec.named(case.inputs).items()}
        self.inputs = [self._put(t.contiguous()) for t in case.inputs]
        by_name = {arg.name: i for i, arg in enumerate(spec.inputs)}
        aliases = dict(spec.aliases)
        self.outputs: list[int] = []
        self.empty: list[Tensor] = []
        for arg, shape, kind in zip(spec.outputs, spec.output_shapes(bound), spec.output_dtypes(kinds), strict=True):
            tensor = torch.empty(shape, dtype=TORCH_DTYPES[kind])
            if tensor.numel():
                tensor.view(-1).view(torch.uint8).fill_(POISON)
            self.empty.append(tensor)
            alias = aliases.get(arg.name)
            self.outputs.append(self._put(tensor) if alias is None else self.inputs[by_name[alias]])
        size = self.launcher.workspace_bytes(self.shapes)
        self.workspace = self._put(torch.full((size,), POISON, dtype=torch.uint8))

    def _put(self, tensor: Tensor) -> int:
        address = self.device.allocate(tensor.nbytes)
        self.sizes[address] = tensor.nbytes
        self.device.upload(address, tensor)
        return address

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.sizes.values())

    def copied(self) -> _Call:
        """Return the same call on buffers of its own, with the same bytes in them."""
        other = copy.copy(self)
        place = {address: self.device.allocate(size) for address, size in self.sizes.items()}
        for address, size in self.sizes.items():
            if size:
                self.device.copy(place[address], address, size)
        other.sizes = {place[address]: size for address, size in self.sizes.items()}
        other.inputs = [place[address] for address in self.inputs]
        other.outputs = [place[address] for address in self.outputs]
        other.workspace = place[self.workspace]
        return other

    def enqueue(self) -> None:
        """Launch once."""
        self.launcher.enqueue(self.shapes, self.inputs, self.outputs, self.workspace, self.device.stream)

    def results(self) -> tuple[Tensor, ...]:
        """Launch once and read the outputs."""
        self.enqueue()
        for address, tensor in zip(self.outputs, self.empty, strict=True):
            self.device.download(address, tensor)
        return tuple(self.empty)

    def free(self) -> None:
        """Give the memory back."""
        for address in self.sizes:
            self.device.free(address)


def seconds_cold(call: _Call, touched: int, repeats: int) -> tuple[float, bool]:
    """Return the seconds of one call that takes turns with copies of itself, and whether its buffers are cold in L2.

    Args:
        call: with its buffers.
        touched: bytes that it reads and writes.
        repeats: least calls that are timed.
    """
    device = call.device
    number, cold = copies_for(touched, call.held_bytes, l2_bytes=device.l2_bytes, free_bytes=device.free_bytes())
    copies = [call.copied() for _ in range(number - 1)]
    try:
        return device.seconds([one.enqueue for one in (call, *copies)], repeats), cold
    finally:
        for one in copies:
            one.free()


def needed(cases: Iterable[Case], real: Iterable[Real]) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Return every set of kernels that cases need: digest -> (op, statics, provider).

    Kernels of a library are among them where it is installed, and nvcc, and the sizes are its own.
    """
    bounds = [(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs)) for case in cases] + [
        (one.op, one.statics) for one in real
    ]
    found = {}
    for op, bound in bounds:
        statics = statics_of(op, bound)
        for provider in providers_of(op):
            if provider in _providers_here(op) and not provider_fault(op, provider, statics):
                found[aot.set_digest(op, statics, provider)] = (op, statics, provider)
    return found


@functools.cache
def _providers_here(op: str) -> tuple[str, ...]:
    """Return whose kernels of an operator can be compiled here; says of others why not."""
    here = []
    for provider in providers_of(op):
        try:
            aot.compiler_of(op, provider)
        except EnvironmentFault as error:
            if provider == TRITON:
                raise
            sys.stderr.write(f"not checked: {op} of {provider}: {error}\n")
            continue
        here.append(provider)
    return tuple(here)


def compile_all(out: Path, sms: list[int], *, jobs: int | None) -> None:
    """Compile the kernels of all cases, with one index, and make the programs that are walked."""
    kept = [kernel_sm(sm) for sm in sms]
    work, real = [], real_cases()
    for sm in kept:
        for op, statics, provider in needed(tiny_cases(), [one for one in real if one.first_sm <= sm]).values():
            work += aot.tasks({op: statics}, [sm], {op: provider})
    sys.stderr.write(f"compiling {len(work)} sets of kernels\n")
    aot.build(work, out / OPERATORS, cache=aot.default_cache(), jobs=jobs)
    for name in MODELS:
        sys.stderr.write(f"making the {name} program\n")
        prepare_model(out / PROGRAMS / name, name, kept, jobs=jobs)


def load(folder: Path, sm: int) -> dict[tuple[str, str], list[tuple[KernelSet, dict[str, bytes]]]]:
    """Return the kernels of one SM: (op, statics as JSON) -> descriptor and cubins of each provider, Triton's first."""
    try:
        index = json.loads((folder / aot.INDEX).read_text(encoding="utf-8"))
    except OSError:
        raise EnvironmentFault(
            f"{folder / aot.INDEX}: missing; gpu_check.py compile {folder.parent} --sm {sm}"
        ) from None
    found: dict[tuple[str, str], list[tuple[KernelSet, dict[str, bytes]]]] = {}
    for entry in index["kernels"]:
        if entry["sm"] == sm:
            path = folder / entry["file"]
            kernels = read_kernels(path)
            cubins = {name: read_cubin(path, image) for name, image in kernels.images.items()}
            key = kernels.op, json.dumps(dict(kernels.statics), sort_keys=True)
            found.setdefault(key, []).append((kernels, cubins))
            found[key].sort(key=lambda one: providers_of(one[0].op).index(one[0].provider))
    if not found:
        raise EnvironmentFault(f"{folder} has no kernels for sm{sm}; gpu_check.py compile {folder.parent} --sm {sm}")
    return found


def run_all(device: Device, folder: Path, roof: Roof | None, *, tiny: bool, real: bool, repeats: int) -> list[Result]:
    """Run cases on a device; prints each line as it comes.

    Args:
        roof: what the device reaches at best; None leaves real cases untimed.
    """
    sets = load(folder, kernel_sm(device.sm))
    results = []

    def one(case: Case, label: str, work: Real | None) -> None:
        statics = statics_of(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
        for kernels, cubins in sets[case.op, json.dumps(statics, sort_keys=True)]:
            whose = "" if kernels.provider == TRITON else f" ({kernels.provider})"
            of_provider(case, label + whose, work, kernels, cubins)

    def of_provider(case: Case, label: str, work: Real | None, kernels: KernelSet, cubins: dict[str, bytes]) -> None:
        call = _Call(device, kernels, cubins, case)
        part, got = judged_part(case, call.results()) if work is not None else (case, call.results())
        right, error = judge(part, got, part.expected())
        result = Result(label, right, error, len(call.launcher.plan(call.shapes).launches))
        if work is not None and roof is not None:
            result = dataclasses.replace(result, target=work.target, anchor=work.anchor)
            needs = work_of(case)
            seconds, cold = seconds_cold(call, needs.num_bytes, repeats)
            result = timed(result, needs, seconds, roof, cold=cold)
        call.free()
        results.append(result)
        print(line(result), flush=True)

    if tiny:
        for case in tiny_cases():
            one(case, str(case), None)
    if real:
        for work in real_cases():
            if kernel_sm(device.sm) < work.first_sm:
                print(f"not checked: {work} is for SMs from {work.first_sm} on", flush=True)
            else:
                one(work.make(), str(work), work)
    return results


def _run(found: argparse.Namespace) -> int:
    device = CudaDevice()
    head = f"{device.name}, sm{device.sm}, torch {torch.__version__}"
    print(head)
    tiny, real = found.only != "real", found.only != "tiny"
    roof = Roof(measure_copy(device), measure_products(device.sm)) if real else None
    results = run_all(device, found.folder / OPERATORS, roof, tiny=tiny, real=real, repeats=found.repeats)
    if roof is not None:
        results, roof = settled(results, roof)
        print(markdown(results, roof, head))
    if found.report is not None and roof is not None:
        write_report(found.report, results, roof, head)
    wrong = [result.case for result in results if not result.right]
    print(f"{len(results) - len(wrong)} of {len(results)} right" + (f"; wrong: {', '.join(wrong)}" if wrong else ""))
    faults = [result.case for result in results if result.fault]
    if faults:
        print(f"{len(faults)} were measured wrongly: {', '.join(faults)}")
    return min(len(wrong) + len(faults), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("compile")
    build.add_argument("folder", type=Path)
    build.add_argument("--sm", default="90")
    build.add_argument("--jobs", type=int, default=None)
    run = commands.add_parser("run")
    run.add_argument("folder", type=Path)
    run.add_argument("--only", choices=["tiny", "real"], default=None)
    run.add_argument("--repeats", type=int, default=20)
    run.add_argument("--report", type=Path, default=None, help="folder for gpu-report.json and gpu-report.md")
    walk = commands.add_parser("walk")
    walk.add_argument("folder", type=Path)
    walk.add_argument("--model", choices=list(MODELS), action="append", default=None)
    found = parser.parse_args()
    try:
        if found.command == "compile":
            compile_all(found.folder, [int(sm) for sm in found.sm.split(",")], jobs=found.jobs)
            return 0
        if found.command == "walk":
            return walk_models(found.folder / PROGRAMS, found.model or list(MODELS))
        return _run(found)
    except SeekforgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
