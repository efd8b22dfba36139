"""What the launches of a step cost by the model of `plugins/cost`: a row per launch, their sum, JSON and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.cli.console import Column, Table
from seekforge.common.errors import EngineError, TargetError
from seekforge.exporter.sizing.calls import Call, StepShape
from seekforge.plugins.cost import model
from seekforge.plugins.cost.card import Card
from seekforge.plugins.cost.work import Load, Work, op_cost
from seekforge.plugins.kernels import aot, sass
from seekforge.plugins.kernels.index import read_index
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, Resources, read_cubin, read_kernels
from seekforge.plugins.kernels.launch_plan import op_kernels, statics_of
from seekforge.plugins.kernels.sm_limits import occupancy
from seekforge.plugins.operator import TRITON

#: Most tokens of a step, and most keys of a sequence, that are estimated: grids of larger ones would not be launched.
MOST_TOKENS, MOST_CONTEXT = 1 << 20, 1 << 22
#: Of a kernel that is not compiled: one program at a time.
_UNKNOWN: Final = Resources(registers=255, stack_bytes=0, shared_bytes=0, tensor_columns=0, occupancy=0.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One launch of a step.

    Attributes:
        op: ONNX op_type.
        what: the parameter of a linear, else empty.
        provider: who provides the kernel, Triton or a library.
        variant: name of the kernel.
        count: how often a step launches it.
        grid: programs in each direction.
        work: what it moves and computes.
        kernel: its code; None where none was read.
        estimate: what the model says.
    """

    op: str
    what: str
    provider: str
    variant: str
    count: int
    grid: tuple[int, int, int]
    work: Work
    kernel: model.Kernel | None
    estimate: model.Estimate


def rows(
    calls: Iterable[Call],
    kernels: Mapping[tuple[str, str], model.Kernel],
    card: Card,
    load: Load,
    sm: int,
    providers: Mapping[str, str] | None = None,
) -> list[Row]:
    """Return a row for each launch of each call.

    Args:
        calls: what the step calls.
        kernels: (op, variant) -> compiled kernel; empty for what shapes say alone.
        card: the GPU.
        load: what decides the work beside the shapes.
        sm: the SM that kernels are compiled for.
        providers: op_type -> provider of its kernels; Triton of those that it does not name.

    Raises:
        ShapeError: there are no kernels for the sizes.
        TargetError: a kernel of the plan is not among `kernels`.
    """
    result = []
    for call in calls:
        provider = (providers or {}).get(call.op, TRITON)
        module = op_kernels(call.op, provider)
        statics = statics_of(call.op, call.bound, provider)
        stages = {one.name: one.num_stages for one in module.variants(statics, sm)}
        for launch in module.plan(call.bound, sm).launches:
            kernel = kernels.get((call.op, launch.variant))
            if kernels and kernel is None:
                raise TargetError(
                    f"{call.op}: no compiled kernel {launch.variant} for sm {sm}; compile the kernels again"
                )
            work = op_cost(call.op, provider).work(launch, call.bound, sm, load)
            judged = kernel or model.Kernel(_UNKNOWN, 8, stages[launch.variant], None)
            result.append(
                Row(
                    op=call.op,
                    what=call.what,
                    provider=provider,
                    variant=launch.variant,
                    count=call.count,
                    grid=launch.grid,
                    work=work,
                    kernel=kernel,
                    estimate=model.estimate(work, judged, card),
                )
            )
    return result


def read_kernel_sets(sets: Sequence[KernelSet], store: Path, *, cache: Path) -> dict[tuple[str, str], model.Kernel]:
    """Return (op, variant) -> kernel with its code, of sets in a folder that `kernels build` wrote.

    Raises:
        TargetError: a cubin cannot be disassembled.
    """
    result = {}
    for kernels in sets:
        variants = {
            one.name: one for one in op_kernels(kernels.op, kernels.provider).variants(kernels.statics, kernels.sm)
        }
        for name, image in kernels.images.items():
            code = aot.read_code(store / f"sm{kernels.sm}" / image.cubin, cache=cache)
            stages = variants[name].num_stages
            result[kernels.op, name] = model.Kernel(image.resources, image.num_warps, stages, code)
    return result


def stored_sets(
    store: Path, calls: Iterable[Call], sm: int, providers: Mapping[str, str] | None = None
) -> list[KernelSet]:
    """Return the kernels that a folder has for some calls; providers are those of `rows`.

    Raises:
        EngineError: the folder is damaged, or a descriptor contradicts itself or its cubin.
        TargetError: it has none for an operator, with the sizes of the calls.
    """
    stored = []
    for entry in read_index(store):
        if entry["sm"] == sm:
            stored.append(read_kernels(store / entry["file"]))
            for image in stored[-1].images.values():
                _check(image, store / entry["file"], sm)
    result = []
    for op, bound in {call.op: call.bound for call in calls}.items():
        provider = (providers or {}).get(op, TRITON)
        statics = statics_of(op, bound, provider)
        names = {one.name for one in op_kernels(op, provider).variants(statics, sm)}
        of_op = [one for one in stored if one.op == op and one.provider == provider]
        fitting = [one for one in of_op if one.statics == statics and set(one.images) == names]
        if not fitting:
            whose = "" if provider == TRITON else f" by {provider}"
            raise TargetError(
                f"{store}: no kernels of {op}{whose} for sm {sm} with these sizes; compile them, or leave out --kernels"
            )
        result.append(fitting[-1])
    return result


def _check(image: Image, descriptor: Path, sm: int) -> None:
    """Compare what a descriptor says of an image with the cubin beside it, and with itself."""
    read_cubin(descriptor, image)
    used = image.resources
    fits = 0 < used.registers <= 255 and image.num_warps <= 32
    held = {"registers": used.registers, "shared_bytes": used.shared_bytes, "tensor_columns": used.tensor_columns}
    if not fits or used.occupancy != round(occupancy(**held, num_warps=image.num_warps, sm=sm), 3):
        raise EngineError(
            f"{descriptor}: {image.variant} has {used.registers} registers, {used.shared_bytes} bytes of shared memory "
            f"and {image.num_warps} warps, which do not give an occupancy of {used.occupancy:g}; "
            "compile the kernels again"
        )


def as_json(listed: Sequence[Row], card: Card, shape: StepShape) -> dict[str, Any]:
    """Return everything that the tables say, and more, as plain values; times in microseconds."""
    return {
        "card": asdict(card),
        "shape": asdict(shape),
        "assumptions": assumptions(),
        "launches": [_launch_json(row) for row in listed],
        "step": step_json(listed),
    }


def assumptions() -> dict[str, Any]:
    """Return the numbers that the model assumes of every GPU."""
    return {
        "memory_share": model.MEMORY_SHARE,
        "tensor_share": model.TENSOR_SHARE,
        "memory_clocks": model.MEMORY_CLOCKS,
        "barrier_clocks": model.BARRIER_CLOCKS,
        "replay_gap_us": model.REPLAY_GAP_S * 1e6,
    }


def step_json(listed: Sequence[Row]) -> dict[str, Any]:
    """Return the sum over all launches of a step: kernels' time, gaps between them, and each operator's part."""
    launches = sum(row.count for row in listed)
    in_turn = sum(row.count * row.estimate.seconds_in_turn * 1e6 for row in listed)
    by_operator: dict[str, float] = {}
    for row in listed:
        by_operator[row.op] = by_operator.get(row.op, 0.0) + row.count * row.estimate.seconds * 1e6
    kernels, gaps = sum(by_operator.values()), launches * model.REPLAY_GAP_S * 1e6
    return {
        "launches": launches,
        "kernels_us": round(kernels, 1),
        "gaps_us": round(gaps, 1),
        "total_us": round(kernels + gaps, 1),
        "total_us_in_turn": round(in_turn + gaps, 1),
        "by_operator_us": {op: round(value, 1) for op, value in by_operator.items()},
    }


def _launch_json(row: Row) -> dict[str, Any]:
    judged, work = row.estimate, row.work
    result: dict[str, Any] = {
        "op": row.op,
        "parameter": row.what or None,
        "provider": row.provider,
        "kernel": row.variant,
        "count": row.count,
        "grid": list(row.grid),
        **asdict(work),
        "memory_bytes": work.memory_bytes,
        "passes": list(work.passes),
        "blocks_per_sm": judged.blocks_per_sm if row.kernel else None,
        "waves": judged.waves if row.kernel else None,
        "roofs_us": {name: round(value * 1e6, 3) for name, value in vars(judged.roofs).items()},
        "us": round(judged.seconds * 1e6, 3),
        "us_in_turn": round(judged.seconds_in_turn * 1e6, 3),
        "bound": judged.bound,
        "tensor_flops_ratio": None if judged.tensor_flops_ratio is None else round(judged.tensor_flops_ratio, 3),
        "code": None,
    }
    if row.kernel is not None and row.kernel.code is not None:
        used, code = row.kernel.resources, row.kernel.code
        result["code"] = {
            "warps": row.kernel.num_warps,
            "registers": used.registers,
            "spill_bytes": used.stack_bytes,
            "shared_bytes": used.shared_bytes,
            "occupancy": used.occupancy,
            "instructions": code.instructions,
            "kinds": dict(code.kinds),
            "loops": [
                {
                    "passes": passes,
                    "instructions": body.instructions,
                    "kinds": dict(body.kinds),
                    "barriers": body.barriers,
                }
                for body, passes in model.loops_of(work, code)
            ],
        }
    return result


def table(listed: Sequence[Row]) -> Table:
    """Return one row per launch."""
    numbers = ("×", "programs", "waves", "MB", "GFLOP", "reg/stack/KiB", "µs", "in turn")
    columns = [Column("operator"), Column("kernel"), *(Column(name, "number") for name in numbers)]
    result = Table([*columns, Column("bound"), Column("main loop, instructions of a warp")], lines=True)
    for row in listed:
        used = row.kernel.resources if row.kernel else None
        result.add(
            f"{row.op} {row.what}".rstrip(),
            row.variant,
            str(row.count),
            f"{row.work.programs:,}",
            f"{row.estimate.waves:,}" if used else "–",
            f"{row.work.memory_bytes / 1e6:.2f}",
            f"{row.work.flops / 1e9:.2f}" if row.work.flops else "",
            f"{used.registers}/{used.stack_bytes}/{used.shared_bytes / 1024:.0f}" if used else "–",
            f"{row.estimate.seconds * 1e6:.1f}",
            f"{row.estimate.seconds_in_turn * 1e6:.1f}",
            row.estimate.bound,
            loop_text(row),
        )
    return result


def loop_text(row: Row) -> str:
    """Return passes and kinds of the loop with most instructions, and whether products are done more than once."""
    code = row.kernel.code if row.kernel else None
    if code is None:
        return ""
    loops = model.loops_of(row.work, code)
    if not loops:
        return f"none: {code.instructions} in all"
    body, passes = max(loops, key=lambda loop: loop[0].instructions * loop[1])
    order = {name: i for i, name in enumerate(sass.KINDS)}
    kinds = sorted(body.kinds.items(), key=lambda item: order[item[0]])
    ratio = row.estimate.tensor_flops_ratio
    twice = f"; products × {ratio:.2f}" if ratio is not None and ratio > 1.01 else ""
    return f"{passes} × {body.instructions}: " + ", ".join(f"{count} {name}" for name, count in kinds) + twice


def summary(listed: Sequence[Row]) -> str:
    """Return the step in one line."""
    step = step_json(listed)
    parts = ", ".join(f"{op} {value:,.0f}" for op, value in step["by_operator_us"].items())
    return (
        f"step: {step['total_us']:,.0f} µs = {step['kernels_us']:,.0f} in kernels + {step['gaps_us']:,.0f} between "
        f"{step['launches']:,} launches; {step['total_us_in_turn']:,.0f} µs if programs of an SM did not overlap; "
        f"µs by operator: {parts}"
    )
