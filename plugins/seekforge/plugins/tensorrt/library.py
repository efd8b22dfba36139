"""Import TensorRT or TensorRT-RTX, once and only when asked, and cure what is wrong with the package.

The wheel of TensorRT-RTX ships `libtensorrt_rtx.so.1`, but its parser opens `libtensorrt_rtx.so` at the first plugin
and ends the process when there is none. `load` therefore gives the process a library of that name: an empty one
that needs the versioned one, so that every symbol is found through it. No file of the installation is touched.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import math
import platform
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final, Literal

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from seekforge.common.errors import EnvironmentFault
from seekforge.common.requirements import command, install
from seekforge.common.temporary import temporary_folder

Flavour = Literal["tensorrt", "tensorrt-rtx"]

#: flavour -> (module, distribution, extra).
MODULES: Final[dict[str, tuple[str, str, str]]] = {
    "tensorrt": ("tensorrt", "tensorrt", "trt"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx", "rtx"),
}
#: What the adapter was written for: first version that works, first that is not known. TensorRT's parser knows
#: RMSNormalization and RotaryEmbedding, which programs have, since 10.15 (its changelog).
VERSIONS: Final[dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "tensorrt": ((10, 15), (12, 0)),
    "tensorrt-rtx": ((1, 7), (1, 8)),
}
#: Most elements of a tensor before versions that count them in 64 bits, and the first such version. TensorRT refused
#: more up to 10.9 at least (NVIDIA/TensorRT issues 1948 and 4408); the notes of 10.11 promise it for most layers, and
#: plugins are not among them. TensorRT-RTX 1.7 builds DeepSeek-V3.2, whose experts are one tensor of 7.5e9 weights.
MOST_ELEMENTS: Final = 2**31 - 1
_COUNTS_IN_64_BITS: Final[dict[str, tuple[int, int]]] = {"tensorrt": (11, 0), "tensorrt-rtx": (1, 7)}
_UNVERSIONED, _VERSIONED = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"
#: platform.machine() -> ELF machine number.
_ELF_MACHINES: Final[dict[str, int]] = {"x86_64": 62, "aarch64": 183}
#: Opened libraries must stay referenced.
_KEPT: list[ctypes.CDLL] = []


@functools.cache
def load(flavour: Flavour) -> Any:
    """Return the module of `flavour`, ready to parse programs with plugins.

    Raises:
        EnvironmentFault: it is not installed, cannot be loaded, or has a version that the adapter does not know.
    """
    name, distribution, extra = MODULES[flavour]
    where = "" if flavour == "tensorrt-rtx" else " on the machine with the GPU that the engine is for"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise EnvironmentFault(
            f"{distribution} is not installed; {install(extra)}{where}, "
            "or build for a target of another backend ('seekforge targets' lists them)"
        ) from None
    except (ImportError, OSError) as error:
        raise EnvironmentFault(f"{distribution} cannot be loaded ({error}); install it again{where}") from None
    check_version(flavour, str(getattr(module, "__version__", "unknown")))
    if flavour == "tensorrt-rtx":
        _give_unversioned_name()
    return module


def check_version(flavour: Flavour, version: str) -> None:
    """Refuse a version that the adapter was not written for.

    Raises:
        EnvironmentFault: it is older or newer.
    """
    first, beyond = VERSIONS[flavour]
    _, distribution, extra = MODULES[flavour]
    installed = _release(version)
    if not first <= installed < beyond:
        low, high = (".".join(map(str, bound)) for bound in (first, beyond))
        raise EnvironmentFault(
            f"{distribution} is {version}, expected at least {low} and below {high}; {install(extra)}"
        )


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor, or nothing where a version does not begin with two numbers."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return ()
    return release[:2] if len(release) > 1 else ()


def installed_version(flavour: Flavour) -> str | None:
    """Return the version of the library that is installed here, or None; nothing is imported."""
    try:
        return importlib.metadata.version(MODULES[flavour][1])
    except importlib.metadata.PackageNotFoundError:
        return None


def large_tensor_fault(flavour: Flavour, version: str | None, name: str, shape: Sequence[int]) -> str:
    """Return why a version of the library cannot build a tensor, and what can; or nothing, also where none is known.

    Args:
        flavour: which library.
        version: its version; None: unknown.
        name, shape: name of the tensor, and its shape at its largest.
    """
    first, count = _COUNTS_IN_64_BITS[flavour], math.prod(shape)
    release = _release(version or "")
    if count <= MOST_ELEMENTS or not release or release >= first:
        return ""
    _, distribution, _ = MODULES[flavour]
    low, high = (".".join(map(str, bound)) for bound in (first, VERSIONS[flavour][1]))
    remedy = command([Requirement(f"{distribution}>={low},<{high}")])
    return (
        f"{name} {list(shape)} has {count} elements, {distribution} {version} takes at most {MOST_ELEMENTS} "
        f"in a tensor; {remedy}"
    )


def _give_unversioned_name() -> None:
    """Make `dlopen("libtensorrt_rtx.so")` succeed in this process."""
    if sys.platform != "linux":
        return  # only the Linux package has two names
    try:
        _KEPT.append(ctypes.CDLL(_UNVERSIONED))
    except OSError:
        pass
    else:
        return  # a whole installation, with the name in the loader's path
    machine = _ELF_MACHINES.get(platform.machine())
    if machine is None:
        raise EnvironmentFault(
            f"tensorrt-rtx: no {_UNVERSIONED} is found and none can be made for {platform.machine()}; "
            f"put a link of that name to {_VERSIONED} into a folder of LD_LIBRARY_PATH"
        )
    with temporary_folder("seekforge-library") as folder:
        path = folder / _UNVERSIONED
        path.write_bytes(forwarding_library(_UNVERSIONED, _VERSIONED, machine))
        _KEPT.append(ctypes.CDLL(str(path)))
    _KEPT.append(ctypes.CDLL(_UNVERSIONED))  # raises here, and not inside the parser, should the loader not know it


def forwarding_library(soname: str, needed: str, machine: int) -> bytes:
    """Return a shared object without code, called `soname`, that needs the library `needed`.

    Args:
        soname: the name that a later `dlopen` asks for.
        needed: the name of the library that has the symbols.
        machine: ELF machine number.
    """
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    header, program, segments = 64, 56, 2
    symbols = header + segments * program  # one null symbol of 24 bytes
    table = symbols + 24  # hash table: one bucket, one chain
    text = table + 16
    dynamic = -(-(text + len(strings)) // 8) * 8
    null, dt_needed, dt_hash, dt_strtab, dt_symtab, dt_strsz, dt_syment, dt_soname = 0, 1, 4, 5, 6, 10, 11, 14
    entries = [
        (dt_needed, 1 + len(soname) + 1),
        (dt_soname, 1),
        (dt_hash, table),
        (dt_strtab, text),
        (dt_symtab, symbols),
        (dt_strsz, len(strings)),
        (dt_syment, 24),
        (null, 0),
    ]
    total = dynamic + 16 * len(entries)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little endian
    elf = struct.pack("<16sHHIQQQIHHHHHH", identity, 3, machine, 1, 0, header, 0, 0, 64, program, segments, 0, 0, 0)
    readable, writable = 4, 6  # the loader writes relocated addresses into the dynamic section
    load_segment = struct.pack("<IIQQQQQQ", 1, writable, 0, 0, 0, total, total, 0x10000)
    size = 16 * len(entries)
    dynamic_segment = struct.pack("<IIQQQQQQ", 2, readable | 2, dynamic, dynamic, dynamic, size, size, 8)
    body = elf + load_segment + dynamic_segment + bytes(24) + struct.pack("<IIII", 1, 1, 0, 0) + strings
    return body.ljust(dynamic, b"\0") + b"".join(struct.pack("<QQ", *entry) for entry in entries)
