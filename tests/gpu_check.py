"""The compiled kernels on a GPU: right, then how fast. `make gpu-check`; needs a CUDA driver, cuda-core, CPU torch.

    python tests/gpu_check.py compile FOLDER --sm 90     on any machine with triton: the kernels of every case below
    python tests/gpu_check.py run FOLDER                 on the GPU: no triton; compares, times, prints a table

Cases are the operators' vectors (tiny) and the shapes of DeepSeek-V3.2 (real). Each goes through the very
`OpLauncher.enqueue` that a plugin calls: launch descriptors, argument packing, workspace. Outputs and workspace
are poisoned first. Exit code 1 when a result is wrong. Tiny cases are small enough for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from kernel_cases import ATTRS, gpu_cases, packed_index, packed_latents
from torch import Tensor

from seekforge.plugins import aot
from seekforge.plugins.device import CudaDriver, Driver, OpLauncher
from seekforge.plugins.dsa_indexer.reference import index_scores
from seekforge.plugins.errors import EnvironmentFault, SeekforgeError
from seekforge.plugins.kernel_sizes import WITH_KERNELS
from seekforge.plugins.launch import KernelSet, read_cubin, read_kernels, statics_of
from seekforge.plugins.quant import fake_quantise
from seekforge.plugins.testing import Case, Draw, calc_diff, equal_bits, same_selection
from seekforge.plugins.torch_ops import DTYPE_NAMES, TORCH_DTYPES

#: calc_diff that a product of FP8 blocks may have: tensor cores add less exactly than f32 (spec §5.2).
PRODUCT_TOLERANCE: Final = 1e-5
POISON: Final = 0xFF


class Device(Protocol):
    """Memory, a stream and a clock beside the driver that launches."""

    name: str
    sm: int
    driver: Driver
    stream: int

    def allocate(self, num_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def upload(self, address: int, data: Tensor) -> None: ...
    def download(self, address: int, data: Tensor) -> None: ...
    def seconds(self, call: Callable[[], None], repeats: int) -> float: ...


class CudaDevice:
    """Device 0, over cuda-bindings."""

    def __init__(self) -> None:
        self.driver = CudaDriver()
        self._cuda: Any = self.driver._driver
        self._do("cuInit", 0)
        device = self._do("cuDeviceGet", 0)
        self._do("cuCtxSetCurrent", self._do("cuDevicePrimaryCtxRetain", device))
        attribute = self._cuda.CUdevice_attribute
        major = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.sm = 10 * major + minor
        self.name = self._do("cuDeviceGetName", 100, device).partition(b"\0")[0].decode()
        self._stream = self._do("cuStreamCreate", 0)
        self.stream = int(self._stream)

    def _do(self, name: str, *args: Any) -> Any:
        try:
            result = getattr(self._cuda, name)(*args)
        except RuntimeError as error:  # no libcuda
            raise EnvironmentFault(f"no CUDA driver here ({error}); run this on a machine with a GPU") from None
        if result[0] != self._cuda.CUresult.CUDA_SUCCESS:
            raise EnvironmentFault(f"{name}: {result[0].name}")
        return result[1] if len(result) > 1 else None

    def allocate(self, num_bytes: int) -> int:
        return int(self._do("cuMemAlloc", max(num_bytes, 256)))

    def free(self, address: int) -> None:
        self._do("cuMemFree", address)

    def upload(self, address: int, data: Tensor) -> None:
        if data.numel():
            self._do("cuMemcpyHtoD", address, data.data_ptr(), data.numel() * data.element_size())

    def download(self, address: int, data: Tensor) -> None:
        self._do("cuStreamSynchronize", self._stream)
        if data.numel():
            self._do("cuMemcpyDtoH", data.data_ptr(), address, data.numel() * data.element_size())

    def seconds(self, call: Callable[[], None], repeats: int) -> float:
        """Time `repeats` calls in one CUDA graph, where launches cost what they do in an engine."""
        call()
        self._do("cuStreamBeginCapture", self._stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        for _ in range(repeats):
            call()
        graph = self._do("cuGraphInstantiate", self._do("cuStreamEndCapture", self._stream), 0)
        start, end = self._do("cuEventCreate", 0), self._do("cuEventCreate", 0)
        self._do("cuGraphLaunch", graph, self._stream)
        self._do("cuEventRecord", start, self._stream)
        self._do("cuGraphLaunch", graph, self._stream)
        self._do("cuEventRecord", end, self._stream)
        self._do("cuEventSynchronize", end)
        return self._do("cuEventElapsedTime", start, end) / 1e3 / repeats


@dataclass(frozen=True)
class Result:
    """What one case gave."""

    case: str
    right: bool
    error: str
    microseconds: float | None = None
    launches: int = 0
    gigabytes_per_s: float | None = None
    teraflops: float | None = None


def run_case(device: Device, kernels: KernelSet, cubins: dict[str, bytes], case: Case) -> tuple[Tensor, ...]:
    """Return what the kernels compute for a case."""
    return _Call(device, kernels, cubins, case).results()


class _Call:
    """One operator call with its tensors in device memory."""

    def __init__(self, device: Device, kernels: KernelSet, cubins: dict[str, bytes], case: Case) -> None:
        self.device, spec = device, case.spec
        self.launcher = OpLauncher(kernels, case.attrs, cubins, device.driver)
        self.shapes = [tuple(t.shape) for t in case.inputs]
        bound = spec.bind(self.shapes, case.attrs)
        kinds = {arg.name: DTYPE_NAMES[t.dtype] for arg, t in zip(spec.inputs, case.inputs, strict=True)}
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
        address = self.device.allocate(tensor.numel() * tensor.element_size())
        self.device.upload(address, tensor)
        return address

    def enqueue(self) -> None:
        """Launch once."""
        self.launcher.enqueue(self.shapes, [], self.inputs, self.outputs, self.workspace, self.device.stream)

    def results(self) -> tuple[Tensor, ...]:
        """Launch once and read the outputs."""
        self.enqueue()
        for address, tensor in zip(self.outputs, self.empty, strict=True):
            self.device.download(address, tensor)
        return tuple(self.empty)

    def free(self) -> None:
        """Give the memory back."""
        for address in {*self.inputs, *self.outputs, self.workspace}:
            self.device.free(address)


# --- right or wrong -------------------------------------------------------------------------------------------


def judge(case: Case, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[bool, str]:
    """Return whether results are right, and the error in words."""
    if case.op == "DsaCacheWrite":
        first = 1 if got[0].dtype == torch.int8 else 64
        same = all(equal_bits(a[first:], b[first:]) for a, b in zip(got, want, strict=True))
        return same, "bytes equal" if same else "bytes differ"
    if case.op == "MoeRoute":
        worst = float(((got[1] - want[1]).abs() / want[1].abs().clamp_min(1e-20)).max()) if got[1].numel() else 0.0
        return torch.equal(got[0], want[0]) and worst < 1e-5, f"ids equal, weights {worst:.1e}"
    if case.op == "DsaIndexer":
        q, w, cache, table, positions = case.inputs
        attrs = case.attrs
        scores = index_scores(q, w, cache, table, positions, attrs["indexer_fp8"], attrs["index_format"])
        same = same_selection(got[0], want[0], scores, 1e-5)
        return same, "same selection" if same else "another selection"
    x, y = got[0].double(), want[0].double()
    finite = y.isfinite()
    diff = calc_diff(x[finite], y[finite]) if torch.equal(finite, x.isfinite()) else math.inf
    limit = 5e-6 if case.op == "DsaAttention" else PRODUCT_TOLERANCE
    return diff <= limit, f"diff {diff:.1e} of {limit:.0e}"


# --- cases ----------------------------------------------------------------------------------------------------


def tiny_cases() -> list[Case]:
    """Return the vectors of every operator with kernels, in the types of a GPU target."""
    found = []
    for op in WITH_KERNELS:
        for case in gpu_cases(op):
            change = ATTRS.get(op, lambda one, kv_format: one)
            formats = ("fp8_ds", "bf16") if op in ATTRS else ("",)
            found += [one for kv_format in formats if (one := change(case, kv_format)) is not None]
    return [case for case in found if _has_kernels(case)]


def _has_kernels(case: Case) -> bool:
    try:
        statics_of(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
    except SeekforgeError:
        return False
    return True


@dataclass(frozen=True)
class Real:
    """A case at real size: what it moves and computes at least. `make` draws it when its turn comes."""

    op: str
    name: str
    statics: dict[str, Any]
    make: Callable[[], Case]
    num_bytes: float
    flops: float = 0.0


def _linear(rows: int, n: int, k: int) -> Real:
    def make() -> Case:
        draw = Draw(rows)
        x, scale = draw.normal(rows, k).bfloat16(), draw.weight_scale(-(-n // 128), k // 128)
        return Case("BlockFp8Linear", "real", (x, draw.fp8(n, k), scale), {"act_quant": "ue8m0"})

    moved = n * k + 2 * rows * (n + k)
    return Real("BlockFp8Linear", f"T={rows} {n}x{k}", {"act_quant": "ue8m0"}, make, moved, 2 * rows * n * k)


def _attention(b: int, q: int, heads: int = 128) -> Real:
    statics = {"H": heads, "C": 512, "R": 64, "kv_format": "fp8_ds"}

    def make() -> Case:
        draw, blocks = Draw(b), 64
        table = draw.block_table(b, blocks, b * blocks + 1)
        rows = (b * blocks + 1) * 64
        latents = torch.cat([fake_quantise(draw.normal(rows, 512)), draw.normal(rows, 64)], 1)
        picked = torch.stack([draw.order(blocks * 64)[:2048].sort().values for _ in range(b * q)]).int()
        inputs = (
            draw.normal(b, q, heads, 512).bfloat16(),
            draw.normal(b, q, heads, 64).bfloat16(),
            packed_latents(latents, 512),
            table,
            picked.view(b, q, 2048),
        )
        return Case("DsaAttention", "real", inputs, {"scale": 0.1352337788608801, "kv_format": "fp8_ds"})

    moved = b * q * (2048 * 660 + 2 * heads * 1088)
    return Real("DsaAttention", f"B={b} Q={q}", statics, make, moved, 2.0 * b * q * heads * 2048 * 1088)


def _indexer(b: int, length: int) -> Real:
    statics = {"Hi": 64, "D": 128, "indexer_fp8": True, "index_format": "fp8_ds"}

    def make() -> Case:
        draw, blocks = Draw(b), length // 64
        table = draw.block_table(b, blocks, b * blocks + 1)
        cache = packed_index(draw.normal((b * blocks + 1) * 64, 128))
        positions = torch.full((b, 1), length - 1)
        inputs = (draw.normal(b, 1, 64, 128).bfloat16(), draw.normal(b, 1, 64) * 0.01, cache, table, positions)
        attrs = {"index_topk": 2048, "indexer_fp8": True, "index_format": "fp8_ds"}
        return Case("DsaIndexer", "real", inputs, attrs)

    return Real("DsaIndexer", f"B={b} L={length}", statics, make, b * length * 136, 2.0 * b * length * 64 * 128)


def _experts(tokens: int) -> Real:
    statics = {"E": 256, "TOPK": 8, "H": 7168, "I2": 4096, "act_quant": "ue8m0"}

    def make() -> Case:
        draw = Draw(tokens)
        ids = torch.stack([draw.order(256)[:8] for _ in range(tokens)]).int()
        w13, w2 = draw.fp8(4096, 7168).repeat(256, 1, 1), draw.fp8(7168, 2048).repeat(256, 1, 1)
        scales = draw.weight_scale(256, 32, 56), draw.weight_scale(256, 56, 16)  # experts differ by their scales
        inputs = (draw.normal(tokens, 7168).bfloat16(), ids, draw.uniform(tokens, 8), w13, scales[0], w2, scales[1])
        return Case("MoeExperts", "real", inputs, {"act_quant": "ue8m0"})

    hit = 256 * (1 - (1 - 8 / 256) ** tokens)
    return Real("MoeExperts", f"T={tokens}", statics, make, hit * 3 * 2048 * 7168, 6.0 * 8 * tokens * 2048 * 7168)


def _route(tokens: int) -> Real:
    statics: dict[str, Any] = {"E": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True}

    attrs = {name: statics[name] for name in ("n_group", "topk_group", "top_k", "norm")} | {"scale": 2.5}

    def make() -> Case:
        draw = Draw(tokens)
        return Case("MoeRoute", "real", (draw.normal(tokens, 256), draw.normal(256) * 0.05), attrs)

    return Real("MoeRoute", f"T={tokens}", statics, make, tokens * 1088)


def _write(tokens: int) -> Real:
    statics: dict[str, Any] = {"C": 512, "R": 64, "D": 128, "kv_format": "fp8_ds", "index_format": "fp8_ds"}
    statics |= {"kv_fp8": True, "indexer_fp8": True}
    attrs = {name: statics[name] for name in ("kv_format", "index_format", "kv_fp8", "indexer_fp8")}

    def make() -> Case:
        draw, blocks = Draw(tokens), tokens // 64 + 2
        caches = torch.zeros(blocks, 64, 656, dtype=torch.int8), torch.zeros(blocks, 8448, dtype=torch.int8)
        rows = [draw.normal(1, tokens, width).bfloat16() for width in (512, 64, 128)]
        slots = draw.order((blocks - 1) * 64)[:tokens].view(1, tokens) + 64
        return Case("DsaCacheWrite", "real", (*caches, *rows, slots), attrs)

    return Real("DsaCacheWrite", f"T={tokens}", statics, make, tokens * 2196)


def real_cases() -> list[Real]:
    """Return the shapes of kernels.md §A that have a published anchor or a clear floor."""
    found = [_linear(t, n, k) for n, k in ((2112, 7168), (24576, 1536), (7168, 16384)) for t in (1, 32, 2048)]
    found += [_write(t) for t in (1, 8192)] + [_route(t) for t in (1, 8192)]
    found += [_indexer(1, 32768), _indexer(32, 32768), _indexer(1, 131072)]
    found += [_attention(1, 1), _attention(64, 1), _attention(1, 512)]
    found += [_experts(t) for t in (1, 32, 256)]
    return [one for one in found if one.op in WITH_KERNELS]


# --- commands -------------------------------------------------------------------------------------------------


def needed(cases: Iterable[Case], real: Iterable[Real]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return every set of kernels that cases need: digest -> (op, statics)."""
    found = {}
    for case in cases:
        statics = statics_of(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
        found[aot.set_digest(case.op, statics)] = (case.op, statics)
    for one in real:
        statics = statics_of(one.op, one.statics)
        found[aot.set_digest(one.op, statics)] = (one.op, statics)
    return found


def compile_all(out: Path, sms: list[int], *, jobs: int | None) -> None:
    """Compile the kernels of all cases, with one index."""
    work = []
    for op, statics in needed(tiny_cases(), real_cases()).values():
        work += aot.tasks({op: statics}, sms)
    sys.stderr.write(f"compiling {len(work)} sets of kernels\n")
    aot.build(work, out, cache=aot.default_cache(), jobs=jobs)


def load(folder: Path, sm: int) -> dict[tuple[str, str], tuple[KernelSet, dict[str, bytes]]]:
    """Return the kernels of one SM: (op, statics as JSON) -> descriptor and cubins."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    found = {}
    for entry in index["kernels"]:
        if entry["sm"] == sm:
            path = folder / entry["file"]
            kernels = read_kernels(path)
            cubins = {name: read_cubin(path, image) for name, image in kernels.images.items()}
            found[kernels.op, json.dumps(dict(kernels.statics), sort_keys=True)] = (kernels, cubins)
    if not found:
        raise EnvironmentFault(f"{folder} has no kernels for sm{sm}; compile them: gpu_check.py compile --sm {sm}")
    return found


def run_all(device: Device, folder: Path, *, tiny: bool, real: bool, repeats: int) -> list[Result]:
    """Run every case on a device; prints each line as it comes."""
    sets = load(folder, 80 if device.sm == 86 else device.sm)
    results = []

    def one(case: Case, label: str, work: Real | None) -> None:
        statics = statics_of(case.op, case.spec.bind([tuple(t.shape) for t in case.inputs], case.attrs))
        kernels, cubins = sets[case.op, json.dumps(statics, sort_keys=True)]
        call = _Call(device, kernels, cubins, case)
        got = call.results()
        right, error = judge(case, got, case.expected())
        seconds = device.seconds(call.enqueue, repeats) if work is not None else None
        launches = len(call.launcher.plan(call.shapes).launches)
        call.free()
        rates: tuple[float | None, float | None] = (None, None)
        if work is not None and seconds:
            rates = work.num_bytes / seconds / 1e9, work.flops / seconds / 1e12
        result = Result(label, right, error, None if seconds is None else seconds * 1e6, launches, *rates)
        results.append(result)
        print(line(result), flush=True)

    if tiny:
        for case in tiny_cases():
            one(case, str(case), None)
    if real:
        for work in real_cases():
            one(work.make(), f"{work.op} {work.name}", work)
    return results


def line(result: Result) -> str:
    """Return one row of the table."""
    text = f"{'ok   ' if result.right else 'WRONG'} {result.case:48} {result.error:24} {result.launches} launches"
    if result.microseconds is not None:
        text += f" {result.microseconds:9.1f} us {result.gigabytes_per_s or 0:7.0f} GB/s"
        text += f" {result.teraflops or 0:7.1f} TFLOPS"
    return text


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
    found = parser.parse_args()
    try:
        if found.command == "compile":
            compile_all(found.folder, [int(sm) for sm in found.sm.split(",")], jobs=found.jobs)
            return 0
        device = CudaDevice()
        print(f"{device.name}, sm{device.sm}")
        tiny, real = found.only != "real", found.only != "tiny"
        results = run_all(device, found.folder, tiny=tiny, real=real, repeats=found.repeats)
    except SeekforgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    wrong = [result.case for result in results if not result.right]
    print(f"{len(results) - len(wrong)} of {len(results)} right" + (f"; wrong: {', '.join(wrong)}" if wrong else ""))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
