"""A time for one launch from counts: what its compiled code issues, what it moves, and how its programs fill a GPU.

The model is simple, and each assumption is a name here. A program does one thing at a time: it issues its
instructions, waits for its tensor instructions, and waits for what it loads; nothing of one program overlaps, since no
kernel here has warps of different tasks. Programs that share an SM overlap perfectly. A launch takes as long as the
slowest of its roofs: memory, L2, and on the SM with most programs the tensor unit, the schedulers, and the path of one
program after another. No cache holds anything of an earlier launch. No measurement of these kernels exists. What others
measured of theirs, compiled here and judged by the same model, decided how long loads beside a pipeline are waited for;
it comes nearer to programs of an SM in turn than to programs that overlap, so an estimate has both times
(`tests/benchmarks/peers.py`, docs/kernels.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from seekforge.plugins.cost.card import Card
from seekforge.plugins.cost.work import Work
from seekforge.plugins.kernels import sass
from seekforge.plugins.kernels.kernel_set import Resources
from seekforge.plugins.kernels.sm_limits import (
    L2_BYTES_PER_CLOCK,
    SCHEDULERS,
    SHARED_BYTES_PER_CLOCK,
    blocks_per_sm,
    is_datacenter,
)
from seekforge.plugins.operator import cdiv

#: Shares of the vendor's rates that long copies and large products reach: 3.0 of 3.35 TB/s and 790 of 989 TFLOPS on an
#: H100, as its users publish them.
MEMORY_SHARE, TENSOR_SHARE = 0.9, 0.8
#: Share of the dense rate that mma.sync reaches where wgmma or tcgen05 exist: 62 % on SM90 ("Dissecting the NVIDIA
#: Hopper Architecture through Microbenchmarking", 2025); on SM100 and SM103 what an SM90 would reach (assumed).
MMA_SYNC_SHARE: Final[dict[int, float]] = {90: 0.62, 100: 0.31, 103: 0.31}
#: Clocks from a load to its value, from memory (the same paper, rounded), and of one barrier of a block (assumed).
MEMORY_CLOCKS, BARRIER_CLOCKS = 600, 30
#: Passes of a loop whose loads are in flight together where the compiler cut it into copies of its body.
CUT_PASSES: Final = 4
#: Seconds between the end of a launch and the start of one that depends on it, in a replayed CUDA graph (published
#: figures are 1 to 1.5 us).
REPLAY_GAP_S: Final = 1.25e-6

_SHAPE: Final = re.compile(r"^(?:[A-Z]?)(?P<letter>[HQ])(?P<group>G?)MMA\.(?P<shape>\d+x\d+x\d+|\d+)")
_SYNC_SHAPES: Final = {"16816": (16, 8, 16), "16832": (16, 8, 32), "1688": (16, 8, 8), "16864": (16, 8, 64)}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        resources: registers, shared memory and the like.
        num_warps: warps of a program.
        num_stages: stages of its load pipeline.
        code: its instructions; None where no disassembler is.
    """

    resources: Resources
    num_warps: int
    num_stages: int
    code: sass.Code | None


@dataclass(frozen=True)
class Roofs:
    """The least time that each resource needs, seconds.

    Attributes:
        memory: bytes that leave or enter the chip.
        l2: bytes that programs ask for.
        tensor: tensor instructions, on the SM with most programs.
        issue: all instructions, on the same.
        path: its programs one after another, as many at a time as fit.
    """

    memory: float
    l2: float
    tensor: float
    issue: float
    path: float

    def longest(self) -> tuple[str, float]:
        """Return the name and the time of the slowest."""
        return max(vars(self).items(), key=lambda item: item[1])


@dataclass(frozen=True)
class Estimate:
    """What the model says of one launch.

    Attributes:
        blocks_per_sm: programs that an SM holds at once.
        waves: how many times the GPU is filled with programs.
        roofs: least times.
        instructions: how many a warp issues in the program with most work; 0 without code.
        tensor_flops_ratio: FLOPs of tensor instructions over those of the tile, in one pass of the main loop; more than
            1 where a product is done twice. None where instructions do not say their shape.
        seconds: time between the launch's start and its end, without the gap before it.
        seconds_in_turn: the same if the programs of an SM that multiply did not overlap, but followed one another.
        bound: name of the slowest roof.
    """

    blocks_per_sm: int
    waves: int
    roofs: Roofs
    instructions: int
    tensor_flops_ratio: float | None
    seconds: float
    seconds_in_turn: float
    bound: str


def estimate(work: Work, kernel: Kernel, card: Card) -> Estimate:
    """Return what the model says of a launch on a GPU."""
    used = kernel.resources
    resident = max(
        1,
        blocks_per_sm(
            registers=used.registers,
            shared_bytes=used.shared_bytes,
            num_warps=kernel.num_warps,
            sm=card.sm,
            tensor_columns=used.tensor_columns,
        ),
    )
    busiest = cdiv(work.programs, card.num_sms)
    program = _program(work, kernel, card)
    clocks = {
        "tensor": program.tensor * busiest,
        "issue": program.issue * busiest,
        "path": program.path * (cdiv(busiest, resident) if kernel.code else min(busiest, 1)),
    }
    roofs = Roofs(
        memory=work.memory_bytes / (card.bytes_per_s * MEMORY_SHARE),
        l2=work.loaded_bytes / (min(max(work.programs, 1), card.num_sms) * L2_BYTES_PER_CLOCK * card.clock_hz),
        **{name: value / card.clock_hz for name, value in clocks.items()},
    )
    bound, seconds = roofs.longest()
    return Estimate(
        blocks_per_sm=resident,
        waves=cdiv(work.programs, card.num_sms * resident),
        roofs=roofs,
        instructions=program.instructions,
        tensor_flops_ratio=flops_ratio(work, kernel),
        seconds=seconds,
        seconds_in_turn=max(seconds, program.path * busiest / card.clock_hz) if work.flops else seconds,
        bound=bound,
    )


@dataclass(frozen=True)
class _Program:
    """Clocks of the program with most work: of its tensor instructions, of the schedulers, and of its own path."""

    tensor: float
    issue: float
    path: float
    instructions: int


def loops_of(work: Work, code: sass.Code) -> list[tuple[sass.Body, int]]:
    """Return the loops that a program runs, each with its passes.

    Of a kernel with products it is the one with most tensor instructions. Of another, all of them where the compiler
    left as many as the source has; else none: every instruction counts once, and loads of `CUT_PASSES` are in flight.
    """
    with_tensor = [body for body in code.bodies if body.tensor]
    if with_tensor:
        main = max(with_tensor, key=lambda body: (body.kinds[sass.TENSOR], body.instructions))
        return [(main, work.passes[0])]
    if work.flops or len(code.bodies) != len(work.passes):
        return []
    return list(zip(code.bodies, work.passes, strict=True))


def _program(work: Work, kernel: Kernel, card: Card) -> _Program:
    code = kernel.code
    if code is None:  # products at the full rate, and one load
        flops = work.pass_flops * max(work.passes, default=0)
        tensor = flops / card.flops_per_clock(work.products or "bf16") / TENSOR_SHARE
        return _Program(tensor, 0.0, tensor + MEMORY_CLOCKS, 0)
    loops = loops_of(work, code)
    once = code.instructions - sum(body.instructions for body, _ in loops)
    instructions = once + sum(body.instructions * passes for body, passes in loops)
    per_clock = kernel.num_warps / SCHEDULERS
    tensor, waits = 0.0, float(MEMORY_CLOCKS)  # the first load
    for body, passes in loops:
        in_pass = _tensor_clocks(body.tensor, work.pass_flops, work, kernel, card)
        tensor += passes * in_pass
        waits += passes * _waits(body, kernel, body.instructions * per_clock + in_pass)
    if not work.flops and not loops:
        waits += sum(work.passes) / CUT_PASSES * MEMORY_CLOCKS
    if work.flops and not loops:  # unrolled whole
        tensor = _tensor_clocks(code.tensor, work.pass_flops * work.passes[0], work, kernel, card)
    issue = instructions * per_clock
    return _Program(tensor, issue, issue + tensor + waits, instructions)


def _waits(body: sass.Body, kernel: Kernel, busy: float) -> float:
    """Return the clocks that a pass of `busy` clocks waits beside them.

    Loads into registers that a pass uses (scales) are waited for in it, also beside a pipeline: of the peers' kernels
    that have one program on an SM this gives the times that were measured, and hiding them gives half. Those for a
    later pass, and a pipeline's, which has `num_stages` - 1 passes of loads in flight, are waited for behind it.
    """
    waits = float(MEMORY_CLOCKS) if body.waits else 0.0
    if body.ahead:
        waits = max(waits, MEMORY_CLOCKS - busy)
    if body.copies and kernel.num_stages > 1:
        waits = max(waits, MEMORY_CLOCKS / (kernel.num_stages - 1) - busy)
    return waits + body.barriers * BARRIER_CLOCKS


def _tensor_clocks(instructions: Mapping[str, int], flops: float, work: Work, kernel: Kernel, card: Card) -> float:
    """Return the clocks of an SM's tensor unit for one program's instructions, or for `flops` where they do not say."""
    if not instructions:
        return 0.0
    clocks = 0.0
    for name, count in instructions.items():
        of_one = _one_clocks(name, card)
        if of_one is None:
            return flops / card.flops_per_clock(work.products or "bf16") / TENSOR_SHARE
        clocks += count * of_one * (kernel.num_warps / (4 if sass.tensor_kind(name) == sass.WGMMA else 1))
    return clocks / TENSOR_SHARE


def _one_clocks(name: str, card: Card) -> float | None:
    """Return the clocks of one tensor instruction; None where its name has no shape.

    One of a warpgroup reads both factors from shared memory, [M, K] and [K, N], and takes as long as that at least.
    """
    shape, letter = shape_of(name)
    if shape is None:
        return None
    m, n, k = shape
    rate = card.flops_per_clock("fp8" if letter == "Q" else "bf16")
    if sass.tensor_kind(name) == sass.WGMMA:
        read = k * (m + n) * (1 if letter == "Q" else 2)
        return max(2 * m * n * k / rate, read / SHARED_BYTES_PER_CLOCK)
    share = MMA_SYNC_SHARE[card.sm] if is_datacenter(card.sm) else 1.0
    return 2 * m * n * k / (rate * share)


def shape_of(name: str) -> tuple[tuple[int, int, int] | None, str]:
    """Return ((M, N, K), H or Q) of a tensor instruction; None for a shape that its name does not say."""
    match = _SHAPE.match(name)
    if match is None:
        return None, ""
    text = match["shape"]
    if "x" in text:
        m, n, k = map(int, text.split("x"))
        return (m, n, k), match["letter"]
    return _SYNC_SHAPES.get(text), match["letter"]


def flops_ratio(work: Work, kernel: Kernel) -> float | None:
    """Return the FLOPs of tensor instructions over those of the tile, of one pass or of a kernel that is unrolled."""
    code = kernel.code
    if code is None or not work.flops:
        return None
    loops = loops_of(work, code)
    instructions = loops[0][0].tensor if loops else code.tensor
    wanted = work.pass_flops * (1 if loops else work.passes[0])
    total = 0.0
    for name, count in instructions.items():
        shape, _ = shape_of(name)
        if shape is None:
            return None
        m, n, k = shape
        total += count * 2 * m * n * k * kernel.num_warps / (4 if sass.tensor_kind(name) == sass.WGMMA else 1)
    return total / wanted
