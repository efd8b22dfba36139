"""The benchmark table of kernels.md §A: what was reached, of what this very GPU can do, beside published figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from gpu_device import Device
from gpu_work import Work

#: Bytes of the copy that measures bandwidth, and the size of the square products that measure math.
COPY_BYTES, GEMM_SIZE = 1 << 30, 8192
#: Precisions whose products are measured.
PRODUCTS: Final = ("bf16", "fp8")


@dataclass(frozen=True)
class Roof:
    """What this GPU reaches at best.

    Attributes:
        gigabytes_per_s: read plus write of a large device copy.
        teraflops: precision -> rate of a large product in torch; empty where torch has no GPU.
    """

    gigabytes_per_s: float
    teraflops: dict[str, float]

    def microseconds(self, work: Work) -> tuple[float, str]:
        """Return the least time that `work` can take, and what bounds it: memory, math, or launch for nothing."""
        memory = work.num_bytes / self.gigabytes_per_s / 1e3
        rate = self.teraflops.get(work.products or "")
        math = work.flops / rate / 1e6 if rate else 0.0
        return (memory, "memory") if memory >= math else (math, "math")


@dataclass(frozen=True)
class Result:
    """What one case gave.

    Attributes:
        case: its name.
        right: whether the result agrees with the reference; error: by how much, in words.
        launches: kernels of one call.
        microseconds: of one call inside a CUDA graph; None for a case that is not timed.
        gigabytes_per_s, teraflops: from the bytes and FLOPs of a perfect kernel.
        roof_microseconds, bound, share: least time on this GPU, what bounds it, and roof / measured.
        target, anchor: as in `gpu_cases.Real`.
    """

    case: str
    right: bool
    error: str
    launches: int
    microseconds: float | None = None
    gigabytes_per_s: float | None = None
    teraflops: float | None = None
    roof_microseconds: float | None = None
    bound: str = ""
    share: float | None = None
    target: str = ""
    anchor: str = ""


def measure_copy(device: Device, *, num_bytes: int = COPY_BYTES, repeats: int = 10) -> float:
    """Return GB/s of a device copy, counted as read plus write."""
    source, to = device.allocate(num_bytes), device.allocate(num_bytes)
    seconds = device.seconds(lambda: device.copy(to, source, num_bytes), repeats)
    device.free(source)
    device.free(to)
    return 2 * num_bytes / seconds / 1e9


def measure_products(sm: int, *, size: int = GEMM_SIZE, repeats: int = 10) -> dict[str, float]:
    """Return precision -> TFLOPS of a square product in torch; nothing where torch sees no GPU."""
    if not torch.cuda.is_available():
        return {}
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    one = torch.ones((), device="cuda")
    work: dict[str, Any] = {"bf16": lambda: a @ a}
    if sm >= 89:
        a8 = a.to(torch.float8_e4m3fn)
        work["fp8"] = lambda: torch._scaled_mm(a8, a8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    found = {}
    for name, product in work.items():
        product()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            product()
        end.record()
        end.synchronize()
        found[name] = 2 * size**3 * repeats / start.elapsed_time(end) / 1e9
    found.setdefault("fp8", found["bf16"])  # bytes are widened and multiplied in bf16
    return found


def timed(result: Result, work: Work, seconds: float, roof: Roof) -> dict[str, Any]:
    """Return what a time adds to a result: rates, and the share of the roof."""
    least, bound = roof.microseconds(work)
    return asdict(result) | {
        "microseconds": seconds * 1e6,
        "gigabytes_per_s": work.num_bytes / seconds / 1e9,
        "teraflops": work.flops / seconds / 1e12 if work.flops else None,
        "roof_microseconds": least,
        "bound": bound,
        "share": least / (seconds * 1e6),
    }


def line(result: Result) -> str:
    """Return one line for the terminal."""
    text = f"{'ok   ' if result.right else 'WRONG'} {result.case:48} {result.error:24} {result.launches} launches"
    if result.microseconds is not None:
        text += f" {result.microseconds:9.1f} us {result.gigabytes_per_s or 0:7.0f} GB/s"
        text += f" {result.teraflops or 0:7.1f} TFLOPS {result.share or 0:5.0%} of the {result.bound} roof"
    return text


def markdown(results: Sequence[Result], roof: Roof, head: str) -> str:
    """Return the table of the timed results, ready for docs/gpu-results.md."""
    rates = ", ".join(f"{name} products {rate:.0f} TFLOPS" for name, rate in roof.teraflops.items())
    measured = f"device copy {roof.gigabytes_per_s:.0f} GB/s" + (f", {rates}" if rates else ", products not measured")
    columns = ("case", "launches", "us", "GB/s", "TFLOPS", "bound", "roof us", "of roof", "target", "published")
    rows = [f"{head}. Measured roofs: {measured}.", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for one in results:
        if one.microseconds is None or one.roof_microseconds is None or one.share is None:
            continue
        cells = (
            one.case if one.right else f"{one.case} (WRONG: {one.error})",
            str(one.launches),
            f"{one.microseconds:.1f}",
            f"{one.gigabytes_per_s:.0f}",
            "–" if one.teraflops is None else f"{one.teraflops:.1f}",
            one.bound,
            f"{one.roof_microseconds:.1f}",
            f"{one.share:.0%}",
            one.target or "–",
            one.anchor or "–",
        )
        rows.append("| " + " | ".join(cells) + " |")
    right = sum(one.right for one in results)
    return "\n".join([*rows, "", f"{right} of {len(results)} cases agree with the reference."]) + "\n"


def write_report(folder: Path, results: Sequence[Result], roof: Roof, head: str) -> None:
    """Write gpu-report.json and gpu-report.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"device": head, "roof": asdict(roof), "results": [asdict(one) for one in results]}
    (folder / "gpu-report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu-report.md").write_text(markdown(results, roof, head), encoding="utf-8")
