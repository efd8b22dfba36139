"""The GPU generations that kernels are compiled for, and what an SM of each has."""

from __future__ import annotations

from typing import Final

#: GPU generations that kernels are compiled for. Cubins run on their own SM only, except sm_80, which also runs on 86.
SMS: Final[tuple[int, ...]] = (80, 89, 90, 100, 103, 120, 121)


def has_fp8(sm: int) -> bool:
    """Return whether tensor cores of `sm` multiply FP8; else bytes are widened to bf16."""
    return sm >= 89


#: The first SM on which a launch may start before the one before it has ended (programmatic dependent launch).
PROGRAMMATIC_SM: Final = 90


def is_datacenter(sm: int) -> bool:
    """Return whether `sm` has wgmma or tcgen05 and some 227 KiB of shared memory per block."""
    return sm in (90, 100, 103)


#: Dynamic shared memory that one block may have, and shared memory of one SM, bytes.
SHARED_LIMIT: Final[dict[int, int]] = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376, 121: 101_376,
}  # fmt: skip
_SHARED_PER_SM: Final[dict[int, int]] = {sm: limit + 1024 for sm, limit in SHARED_LIMIT.items()}
_WARPS_PER_SM: Final[dict[int, int]] = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48, 121: 48}
_BLOCKS_PER_SM: Final[dict[int, int]] = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24, 121: 24}
_REGISTERS_PER_SM, _REGISTER_UNIT, _SYSTEM_SHARED = 65_536, 256, 1024


#: Of an SM of every generation here: schedulers, each of which issues one instruction of a warp per clock (CUDA
#: programming guide, "Multiprocessor"); bytes per clock of shared memory (32 banks of 4), and of what L2 sends it
#: (Nsight Compute, "L2 to L1 fabric").
SCHEDULERS, SHARED_BYTES_PER_CLOCK, L2_BYTES_PER_CLOCK = 4, 128, 64


#: Columns of tensor memory of an SM that has tcgen05.
TENSOR_COLUMNS: Final = 512


def blocks_per_sm(*, registers: int, shared_bytes: int, num_warps: int, sm: int, tensor_columns: int = 0) -> int:
    """Return how many blocks an SM holds at once; 0 when one does not fit.

    Registers are given to warps in units of 256; each block costs 1 KiB of shared memory beside its own. A block that
    asks for more columns of tensor memory than others left waits.
    """
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS_PER_SM // (per_warp * num_warps)
    by_shared = _SHARED_PER_SM[sm] // (shared_bytes + _SYSTEM_SHARED)
    by_columns = TENSOR_COLUMNS // tensor_columns if tensor_columns else _BLOCKS_PER_SM[sm]
    return min(by_registers, by_shared, by_columns, _WARPS_PER_SM[sm] // num_warps, _BLOCKS_PER_SM[sm])


def occupancy(*, registers: int, shared_bytes: int, num_warps: int, sm: int, tensor_columns: int = 0) -> float:
    """Return resident warps as a share of the most that an SM holds; 0 when a block does not fit."""
    blocks = blocks_per_sm(
        registers=registers, shared_bytes=shared_bytes, num_warps=num_warps, sm=sm, tensor_columns=tensor_columns
    )
    return blocks * num_warps / _WARPS_PER_SM[sm]
