"""What the compiler lets pass: kernels a GPU would not run, spills, lost tensor instructions. Pure text and numbers."""

from __future__ import annotations

import re
from typing import Final

from seekforge.plugins.kernels import sass
from seekforge.plugins.kernels.launch_plan import Variant
from seekforge.plugins.kernels.sm_limits import SHARED_LIMIT, TENSOR_COLUMNS, is_datacenter
from seekforge.plugins.registry import KERNEL_FORMS

#: (op, variant, SM) -> most bytes of stack that a kernel may have, and why.
KNOWN_SPILLS: Final[dict[tuple[str, str, int], tuple[int, str]]] = {
    (op, variant, sm): most for op, form in KERNEL_FORMS.items() for (variant, sm), most in form.known_spills.items()
}

#: (op, variant, SM) -> why a kernel multiplies with mma.sync on SMs that have wgmma or tcgen05.
KNOWN_MMA_SYNC: Final[dict[tuple[str, str, int], str]] = {
    (op, variant, sm): reason
    for op, form in KERNEL_FORMS.items()
    for (variant, sm), reason in form.known_mma_sync.items()
}
#: Most heads of a tile that would leave wgmma and tcgen05, which take 64 rows, three quarters empty.
_FEW_HEADS: Final = 16


def tensor_unit(sm: int) -> str:
    """Return the kind of tensor instruction that products should use on an SM (`sass.tensor_kind`)."""
    return sass.MMA_SYNC if not is_datacenter(sm) else sass.WGMMA if sm == 90 else sass.TCGEN05


def tensor_instruction(op: str, variant: Variant, sm: int) -> str:
    """Return the tensor instruction that a kernel has to have, without shape and types; nothing if it has no products.

    A variant multiplies FP8 where its constants say that activations are quantized (`QUANT`), that the SM has FP8, and
    that weights are not `NVFP4`; with mma.sync only where there is nothing better: elsewhere Triton gives it f16, in
    which products are exact too.
    """
    if not variant.main_loop:
        return ""
    few = int(variant.constants.get("BLOCK_H", 64)) <= _FEW_HEADS
    unit = sass.MMA_SYNC if few or (op, variant.name, sm) in KNOWN_MMA_SYNC else tensor_unit(sm)
    fp8 = variant.constants.get("QUANT") and variant.constants.get("FP8") and not variant.constants.get("NVFP4")
    letter = "Q" if fp8 and (unit != sass.MMA_SYNC or not is_datacenter(sm)) else "H"
    return {sass.MMA_SYNC: "{}MMA", sass.WGMMA: "{}GMMA", sass.TCGEN05: "UTC{}MMA"}[unit].format(letter)


def unrunnable(ptx: str, *, sm: int, shared_bytes: int, tensor_columns: int, scratch: int, profile: int) -> str:
    """Return why a compiled kernel could not run, or nothing. Triton reports none of these."""
    if shared_bytes > SHARED_LIMIT[sm]:
        return f"{shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}; use smaller tiles"
    if tensor_columns > TENSOR_COLUMNS or re.search(r"^\s*trap;", ptx, re.M):
        columns = f"tensor memory {tensor_columns} of {TENSOR_COLUMNS} columns"
        return f"the compiled body only traps ({columns}); use smaller tiles"
    if scratch:
        return f"it asks for {scratch} bytes of global scratch per block, which no launcher gives; use plain pointers"
    if profile:
        return "it asks for profile scratch; compile without instrumentation"
    return ""


def faults(op: str, variant: Variant, sm: int, *, stack_bytes: int, code: sass.Code) -> list[str]:
    """Return a line for each thing that slows a compiled kernel and is not known: spills, lost tensor instructions.

    Args:
        op: ONNX op_type.
        variant: what was compiled.
        sm: what for.
        stack_bytes: bytes of stack per thread.
        code: what was compiled to.
    """
    where, faults = f"{op} {variant.name} sm{sm}", []
    most = KNOWN_SPILLS.get((op, variant.name, sm), (0, ""))[0]
    if stack_bytes > most:
        faults.append(f"{where}: {stack_bytes} bytes of stack, {most} known")
    if not most and code.spill_stores + code.spill_loads:
        faults.append(f"{where}: spills, {code.spill_stores} stores and {code.spill_loads} loads")
    wanted = tensor_instruction(op, variant, sm)
    has = {name.split(".")[0] for name in code.tensor}
    if has != ({wanted} if wanted else set()):
        made = " and ".join(sorted(has)) or "no tensor instruction"
        faults.append(f"{where}: compiled to {made}, expected {wanted or 'none'}")
    return faults
