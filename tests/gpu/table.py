"""The benchmark table: what was reached, of what this very GPU can do, beside published figures.

The table cannot flatter. A call is timed on buffers in turns, so that weights and caches come from memory as they do in
an engine; where that cannot be, its row has no share of the roof. The roof is the best that was seen: probes first,
and a case that is better than they are, within what probes may miss, raises it for all. One that is better by more
has moved or computed less than it was credited with: a fault of the measurement, which fails the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from tests.gpu.device import Device
from tests.gpu.work import Work

#: Bytes of the copy that measures bandwidth, and the size of the square products that measure math.
COPY_BYTES, GEMM_SIZE = 1 << 30, 8192
#: Times L2 that is touched between two uses of the same bytes: of a cache that replaces at random, exp(-4) is left.
COLD: Final = 4
#: Most copies of a call's buffers.
MOST_COPIES: Final = 1024
#: Share of free memory that copies may take.
_SPENDABLE: Final = 0.9
#: How much better than the probes a case may be: reading alone is up to a tenth faster than a copy.
LEEWAY: Final = 1.1
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
        products = work.flops / rate / 1e6 if rate else 0.0
        return (memory, "memory") if memory >= products else (products, "math")


@dataclass(frozen=True)
class Result:
    """What one case gave.

    Attributes:
        case: its name.
        right: whether the result agrees with the reference; error: by how much, in words.
        launches: kernels of one call.
        microseconds: of one call inside a CUDA graph; None for a case that is not timed.
        gigabytes_per_s, teraflops: from the bytes and FLOPs of a perfect kernel.
        work: bytes and FLOPs of a perfect kernel.
        cold: whether nothing of a call's buffers was in L2 when it began.
        fault: why the time cannot be right; such a row has no share.
        roof_microseconds, bound, share: least time on this GPU, what bounds it, and roof / measured, at most 1; None
            where the buffers were not cold.
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
    work: Work | None = None
    cold: bool = True
    fault: str = ""
    target: str = ""
    anchor: str = ""


def measure_copy(device: Device, *, num_bytes: int = COPY_BYTES, repeats: int = 10) -> float:
    """Return GB/s of a device copy, counted as read plus write."""
    source, to = device.allocate(num_bytes), device.allocate(num_bytes)
    seconds = device.seconds([lambda: device.copy(to, source, num_bytes)], repeats)
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


def copies_for(touched: int, held: int, *, l2_bytes: int, free_bytes: int) -> tuple[int, bool]:
    """Return how many copies of its buffers a call is timed on, and whether they are cold in L2 then.

    Args:
        touched: bytes that one call reads and writes.
        held: bytes of its buffers.
        l2_bytes: of the device.
        free_bytes: device memory beside the first copy.
    """
    wanted = max(1, math.ceil(COLD * l2_bytes / max(touched, 1)))
    affordable = 1 + int(_SPENDABLE * free_bytes) // max(held, 1)
    copies = min(wanted, affordable, MOST_COPIES)
    return copies, copies == wanted


def timed(result: Result, work: Work, seconds: float, roof: Roof, *, cold: bool = True) -> Result:
    """Return a result with its time: rates, and the share of a roof."""
    added = replace(
        result,
        microseconds=seconds * 1e6,
        gigabytes_per_s=work.num_bytes / seconds / 1e9,
        teraflops=work.flops / seconds / 1e12 if work.flops else None,
        work=work,
        cold=cold,
    )
    return _shared(added, roof)


def _shared(result: Result, roof: Roof) -> Result:
    """Return a timed result with its share of a roof, or with the fault that it is better than anything can be."""
    assert result.work is not None and result.microseconds is not None
    least, bound = roof.microseconds(result.work)
    share = least / result.microseconds
    fault = ""
    if result.cold and share > LEEWAY:
        fault = f"{share:.2f} of the {bound} roof: less was moved or computed than is counted"
    kept = share if result.cold and not fault else None
    return replace(result, roof_microseconds=least, bound=bound, share=kept, fault=fault)


def settled(results: Sequence[Result], roof: Roof) -> tuple[list[Result], Roof]:
    """Return the results by the best roof that was seen, which no share exceeds, and that roof.

    Only right and cold results raise it, and none with a fault.
    """
    memory, rates = roof.gigabytes_per_s, dict(roof.teraflops)
    for one in results:
        if one.right and one.share is not None and one.work is not None:
            memory = max(memory, one.gigabytes_per_s or 0.0)
            if one.work.products in rates:
                rates[one.work.products] = max(rates[one.work.products], one.teraflops or 0.0)
    best = Roof(memory, rates)
    return [one if one.work is None or one.fault else _capped(_shared(one, best)) for one in results], best


def _capped(result: Result) -> Result:
    """A wrong result does not raise the roof, and what is better than the roof is then a fault."""
    if result.share is None or result.share <= 1 + 1e-9:
        return replace(result, share=None if result.share is None else min(result.share, 1.0))
    return replace(result, share=None, fault=f"{result.share:.2f} of the {result.bound} roof, and the result is wrong")


def line(result: Result) -> str:
    """Return one line for the terminal."""
    text = f"{'ok   ' if result.right else 'WRONG'} {result.case:48} {result.error:24} {result.launches} launches"
    if result.microseconds is not None:
        text += f" {result.microseconds:9.1f} us {result.gigabytes_per_s or 0:7.0f} GB/s"
        text += f" {result.teraflops or 0:7.1f} TFLOPS {_share_text(result)}"
    return text


def _share_text(result: Result) -> str:
    if result.fault:
        return f"FAULT {result.fault}"
    if result.share is None:
        return "no share, its buffers stay in L2"
    if result.share > 1:
        return f"better than the {result.bound} probe"
    return f"{result.share:5.0%} of the {result.bound} roof"


def markdown(results: Sequence[Result], roof: Roof, head: str) -> str:
    """Return the table of the timed results, ready for docs/gpu-results.md."""
    rates = ", ".join(f"{name} products {rate:.0f} TFLOPS" for name, rate in roof.teraflops.items())
    measured = f"device copy {roof.gigabytes_per_s:.0f} GB/s" + (f", {rates}" if rates else ", products not measured")
    columns = ("case", "launches", "us", "GB/s", "TFLOPS", "bound", "roof us", "of roof", "target", "published")
    rows = [
        f"{head}. Measured roofs: {measured}. Buffers are cold in L2 unless a row says otherwise.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for one in results:
        if one.microseconds is None or one.roof_microseconds is None:
            continue
        share = "FAULT" if one.fault else "in L2" if one.share is None else f"{one.share:.0%}"
        cells = (
            f"{one.case}{_remarks(one)}",
            str(one.launches),
            f"{one.microseconds:.1f}",
            f"{one.gigabytes_per_s:.0f}",
            "–" if one.teraflops is None else f"{one.teraflops:.1f}",
            one.bound,
            f"{one.roof_microseconds:.1f}",
            share,
            one.target or "–",
            one.anchor or "–",
        )
        rows.append("| " + " | ".join(cells) + " |")
    right = sum(one.right for one in results)
    return "\n".join([*rows, "", f"{right} of {len(results)} cases agree with the reference."]) + "\n"


def _remarks(result: Result) -> str:
    found = [] if result.right else [f"WRONG: {result.error}"]
    found += [f"FAULT: {result.fault}"] if result.fault else []
    return f" ({'; '.join(found)})" if found else ""


def write_report(folder: Path, results: Sequence[Result], roof: Roof, head: str) -> None:
    """Write gpu-report.json and gpu-report.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"device": head, "roof": asdict(roof), "results": [asdict(one) for one in results]}
    (folder / "gpu-report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu-report.md").write_text(markdown(results, roof, head), encoding="utf-8")
