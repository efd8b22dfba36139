"""What the compiler lets pass and a GPU would not run, and which spills are known. Pure text and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from seekforge.plugins.launch import SHARED_LIMIT, KernelSet

#: Columns of tensor memory on SM100 and SM103; above it Triton writes a kernel that only traps.
TMEM_COLUMNS: Final = 512

_NARROW = "bytes are widened by hand; smaller tiles spill more"
_WIDE = "64 heads, which wgmma and tcgen05 need, keep [64, 512] sums; whether 32 without a stack is faster needs a GPU"
_TWO = "gate and up keep two [128, 128] sums; 64 rows have no stack but read the weights twice as often"
#: (op, variant, SM) -> the reason for which a kernel with a main loop may have a stack, and its most bytes.
KNOWN_SPILLS: Final[dict[tuple[str, str, int], tuple[int, str]]] = {
    ("BlockFp8Linear", "swap-16x128", 80): (8, "two registers at 128; the tile is bound by streaming the weight"),
    ("DsaAttention", "part", 80): (24, _NARROW),
    ("DsaAttention", "attend", 80): (24, _NARROW),
    ("DsaAttention", "attend-expanded", 90): (168, _WIDE),
    ("DsaAttention", "attend-expanded", 100): (8, _WIDE),
    ("DsaAttention", "attend-expanded", 103): (8, _WIDE),
    ("MoeExperts", "up-64", 80): (88, _NARROW),
    ("MoeExperts", "up-128", 90): (64, _TWO),
    ("MoeExperts", "up-128", 100): (136, _TWO),
    ("MoeExperts", "up-128", 103): (136, _TWO),
}


def unrunnable(ptx: str, *, sm: int, shared_bytes: int, tmem: int, scratch: int, profile: int) -> str:
    """Return why a compiled kernel could not run, or nothing. Triton reports none of these."""
    if shared_bytes > SHARED_LIMIT[sm]:
        return f"{shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}; use smaller tiles"
    if tmem > TMEM_COLUMNS or re.search(r"^\s*trap;", ptx, re.M):
        return f"the compiled body only traps (tensor memory {tmem} of {TMEM_COLUMNS} columns); use smaller tiles"
    if scratch:
        return f"it asks for {scratch} bytes of global scratch per block, which no launcher gives; use plain pointers"
    if profile:
        return "it asks for profile scratch; compile without instrumentation"
    return ""


def unlisted_spills(sets: Iterable[KernelSet]) -> list[str]:
    """Return a line for each main-loop kernel that has a stack and is not in `KNOWN_SPILLS`, or more than it says."""
    found = []
    for kernels in sets:
        for image in kernels.images.values():
            most = KNOWN_SPILLS.get((kernels.op, image.variant, kernels.sm), (0, ""))[0]
            if image.main_loop and image.resources.stack_bytes > most:
                stack = image.resources.stack_bytes
                found.append(f"{kernels.op} {image.variant} sm{kernels.sm}: {stack} bytes of stack, {most} known")
    return found
