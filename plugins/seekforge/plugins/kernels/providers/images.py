"""One variant of an operator compiled to an image: by Triton, or by nvcc over a library's headers. Needs no GPU.

Triton is imported only by who compiles with it, in a process that serves one SM (`kernels.aot`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.requirements import install
from seekforge.common.temporary import temporary_folder
from seekforge.plugins.kernels import rules
from seekforge.plugins.kernels.cuda_driver import needed_driver
from seekforge.plugins.kernels.kernel_set import Image, Param, Resources, argument_code
from seekforge.plugins.kernels.launch_plan import Variant
from seekforge.plugins.kernels.providers.compile import compile_library
from seekforge.plugins.kernels.sm_limits import PROGRAMMATIC_SM, occupancy
from seekforge.plugins.operator import TRITON
from seekforge.plugins.registry import SPECS

#: Bytes of shared memory that CUDA itself takes of a block that has any, and counts as static.
_RESERVED: Final = 1024


def compiler() -> str:
    """Return the name and version of the compiler of Triton's kernels.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        return f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(
            f"triton is not installed, and kernels are compiled with it; {install('kernels')} (no GPU is needed)"
        ) from None


def compile_variant(op: str, variant: Variant, sm: int, provider: str = TRITON) -> tuple[Image, bytes]:
    """Compile one variant for one SM; call it in a process that serves one SM only.

    Raises:
        EnvironmentFault: a compiler or a library is not installed.
        TargetError: it does not compile, or the result could not run.
    """
    where = f"{op} {variant.name} sm{sm}"
    made = _by_triton(op, variant, sm) if provider == TRITON else _by_nvcc(op, variant, sm, provider)
    return _image(where, variant, sm, made)


@dataclass(frozen=True)
class _Made:
    """What a compiler gave: code, the signature that it has, and what a launch of it needs."""

    cubin: bytes
    entry: str
    signature: tuple[tuple[str, str], ...]
    num_warps: int
    num_ctas: int = 1
    shared_bytes: int = 0
    tensor_columns: int = 0
    scratch_align: int = 1
    programmatic: bool = False


def _by_nvcc(op: str, variant: Variant, sm: int, provider: str) -> _Made:
    try:
        cubin = compile_library(op, variant, sm, provider)
    except TargetError as error:
        raise TargetError(f"{op} {variant.name} sm{sm}: does not compile: {error}") from None
    return _Made(cubin, variant.kernel, tuple(variant.types.items()), variant.num_warps)


def _by_triton(op: str, variant: Variant, sm: int) -> _Made:
    where = f"{op} {variant.name} sm{sm}"
    triton = importlib.import_module("triton")
    backend = importlib.import_module("triton.backends.compiler")
    source_class = importlib.import_module("triton.compiler").ASTSource
    device_lib: Any = importlib.import_module("seekforge.plugins.kernels.device_lib")
    device_lib.PROGRAMMATIC = importlib.import_module("triton.language").constexpr(sm >= PROGRAMMATIC_SM)
    function = getattr(importlib.import_module(f"seekforge.plugins.{SPECS[op].torch_name}.kernel"), variant.kernel)
    aligned = [name for name, kind in variant.types.items() if kind.startswith("*")] + list(variant.aligned)
    source = source_class(
        function,
        signature={name: variant.types.get(name, "constexpr") for name in function.arg_names},
        constexprs=dict(variant.constants),
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    with temporary_folder("seekforge-kernels") as scratch:
        os.environ["TRITON_CACHE_DIR"] = str(scratch)  # ours is the cache; Triton's depends on the process
        try:
            made = triton.compile(source, target=backend.GPUTarget("cuda", sm, 32), options=options)
        except Exception as error:
            raise TargetError(f"{where}: does not compile: {type(error).__name__}: {error}") from None
        cubin, ptx, meta = made.asm["cubin"], made.asm["ptx"], made.metadata
    names = [(name, variant.types[name]) for name in function.arg_names if name in variant.types]
    names += [("", "*u8"), ("", "*u8")]
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.S)
    declared = entry.group(1).count(".param") if entry else -1
    if len(names) != declared:
        raise TargetError(f"{where}: {len(names)} parameters expected, PTX has {declared}")
    tensor_columns = getattr(meta, "tmem_size", 0) or 0
    fault = rules.unrunnable(
        ptx,
        sm=sm,
        shared_bytes=meta.shared,
        tensor_columns=tensor_columns,
        scratch=meta.global_scratch_size,
        profile=meta.profile_scratch_size,
    )
    if fault:
        raise TargetError(f"{where}: {fault}")
    return _Made(
        cubin, meta.name, tuple(names), meta.num_warps, meta.num_ctas, meta.shared, tensor_columns,
        meta.global_scratch_align, programmatic="griddepcontrol.wait" in ptx,
    )  # fmt: skip


def _image(where: str, variant: Variant, sm: int, made: _Made) -> tuple[Image, bytes]:
    """Return the record of a cubin, checked: it takes the arguments of its variant, and asks for nothing else."""
    layout, used = inspect_cubin(made.cubin)
    sizes = [struct.calcsize("<" + argument_code(Param(name, kind, 0, 1))) for name, kind in made.signature]
    got = [size for _, size in layout]
    if got != sizes:
        raise TargetError(f"{where}: parameters of {sizes} bytes expected, the cubin has {got}")
    if list(used) != [made.entry]:
        raise TargetError(f"{where}: the cubin has the kernels {', '.join(used)}, expected {made.entry} alone")
    registers, stack, static = used[made.entry]
    if static > _RESERVED:
        raise TargetError(f"{where}: {static} bytes of static shared memory, which no launch plan knows of")
    try:
        driver = needed_driver(made.cubin)
    except TargetError as error:
        raise TargetError(f"{where}: {error}") from None
    sha256 = hashlib.sha256(made.cubin).hexdigest()
    held = {"registers": registers, "shared_bytes": made.shared_bytes, "tensor_columns": made.tensor_columns}
    resident = occupancy(**held, num_warps=made.num_warps, sm=sm)
    image = Image(
        variant=variant.name,
        entry=made.entry,
        cubin=f"{sha256[:32]}.cubin",
        sha256=sha256,
        num_warps=made.num_warps,
        num_ctas=made.num_ctas,
        scratch_bytes=0,
        scratch_align=made.scratch_align,
        params=tuple(
            Param(name, kind, offset, size) for (name, kind), (offset, size) in zip(made.signature, layout, strict=True)
        ),
        main_loop=variant.main_loop,
        driver=driver,
        programmatic=made.programmatic,
        resources=Resources(**held, stack_bytes=stack, occupancy=round(resident, 3)),
    )
    return image, made.cubin


def inspect_cubin(cubin: bytes) -> tuple[list[tuple[int, int]], dict[str, tuple[int, int, int]]]:
    """Return what a cubin says of itself.

    Returns:
        (offset, size) of each parameter; kernel -> registers and bytes of stack per thread, static shared memory.
    """
    tool = packaged_tool("cuobjdump")
    with temporary_folder("seekforge-kernels") as folder:
        file = folder / "kernel.cubin"
        file.write_bytes(cubin)

        def dump(option: str) -> str:
            return subprocess.run(
                [tool, option, file], capture_output=True, text=True, errors="replace", check=True
            ).stdout

        elf, usage = dump("-elf"), dump("--dump-resource-usage")
    parameters = re.findall(r"Ordinal\s*:\s*(0x\w+)\s*Offset\s*:\s*(0x\w+)\s*Size\s*:\s*(0x\w+)", elf)
    layout = [(off, size) for _, off, size in sorted((int(o, 16), int(a, 16), int(s, 16)) for o, a, s in parameters)]
    functions = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if not functions:
        raise TargetError(f"cuobjdump reports no registers; {install('kernels')}")
    return layout, {name: (int(registers), int(stack), int(static)) for name, registers, stack, static in functions}


def packaged_tool(name: str) -> Path:
    """Return where the compiler's wheel has one of NVIDIA's tools."""
    compiler()  # says what to install
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None  # compiler() found the distribution
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
