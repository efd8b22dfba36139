"""Which driver compiled kernels need, and why CUDA does not start. Pure: no CUDA library is imported.

Versions are numbers as CUDA's `cudaDriverGetVersion` gives them: 13000 is CUDA 13.0. A driver runs what toolkits of its
own or an earlier major version compiled (minor version compatibility), so of a toolkit only the major version counts,
unless the format of its code is newer.
"""

from __future__ import annotations

import re
from typing import Final

from seekforge.common.errors import TargetError

#: CUDA version -> the first branch of NVIDIA's Linux drivers that has it. Of the first version of every major one:
#: NVIDIA's "CUDA compatibility" guide, minor version compatibility, table 1; of the others: its release notes.
_BRANCHES: Final[dict[int, int]] = {
    11000: 450, 12000: 525, 12010: 530, 12020: 535, 12030: 545, 12040: 550, 12050: 555, 12060: 560, 12080: 570,
    12090: 575, 13000: 580,
}  # fmt: skip
#: (EI_OSABI, EI_ABIVERSION) of a cubin -> the first CUDA version whose driver reads it. LLVM calls them CUDA V1 and V2
#: (llvm/BinaryFormat/ELF.h); V2 came with Blackwell in CUDA 12.8.
_ABIS: Final[dict[tuple[int, int], int]] = {(51, 7): 12000, (65, 8): 12080}
_MACHINE_CUDA: Final = 190
#: A note of newer assemblers that names them.
_TOOL = re.compile(rb"Cuda compilation tools, release (\d+)\.\d+")
#: SM -> what kernels need that the pinned Triton compiles: it has an assembler of CUDA 12.9 for GPUs before Hopper, and
#: one of CUDA 13 for Hopper and later. An engine has the number that was read from its own kernels.
KERNELS_NEED: Final[dict[int, int]] = {
    80: 12000, 86: 12000, 89: 12000, 90: 13000, 100: 13000, 103: 13000, 120: 13000, 121: 13000,
}  # fmt: skip


def version_text(version: int) -> str:
    """Return 13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def driver_branch(version: int) -> int | None:
    """Return the branch of NVIDIA's drivers from which on they are of a CUDA version, or None where it is not known."""
    return next((branch for known, branch in sorted(_BRANCHES.items()) if known >= version), None)


def version_of_branch(branch: int) -> int:
    """Return the CUDA version that drivers of a branch have at least, by what is known here; 0 for older ones."""
    return max((version for version, first in _BRANCHES.items() if first <= branch), default=0)


def needs(version: int) -> str:
    """Return the words for a driver of at least a CUDA version."""
    branch = driver_branch(version)
    return f"a driver of CUDA {version_text(version)} or later" + ("" if branch is None else f" (r{branch})")


def needed_driver(cubin: bytes) -> int:
    """Return the CUDA version that a driver must have to load a cubin, read from its ELF header and its notes.

    Raises:
        TargetError: it is no cubin, or of a format that nothing is known of.
    """
    if cubin[:4] != b"\x7fELF" or int.from_bytes(cubin[18:20], "little") != _MACHINE_CUDA:
        raise TargetError("what was compiled is no cubin (an ELF file for CUDA)")
    abi = cubin[7], cubin[8]
    if abi not in _ABIS:
        raise TargetError(
            f"cubins of OS ABI {abi[0]} version {abi[1]} are not known here, so neither is the driver that loads them; "
            "install the triton of the 'kernels' extra"
        )
    tools = [int(tool) for tool in _TOOL.findall(cubin)]
    return max(_ABIS[abi], 1000 * max(tools, default=0))


def too_old(what: str, version: int, driver: int) -> str | None:
    """Return the sentence that refuses a driver, or None where it will do.

    Args:
        what: who needs it, in the plural.
        version: CUDA version that the driver must have.
        driver: CUDA version that it has.
    """
    if driver >= version:
        return None
    return f"{what} need {needs(version)}, the driver here is of CUDA {version_text(driver)}; install a newer driver"


#: Error of CUDA's start -> what it means and what to do. Numbers are the same in the runtime and in the driver API
#: (`cudaError_t`, `CUresult`), but 2, 3 and 35, which mean the same or are of one alone.
_REMEDIES: Final[dict[int, str]] = {
    2: "no memory for a CUDA context: 'nvidia-smi' lists the processes that hold the GPU's",
    3: "the driver could not be started: see 'nvidia-smi' and the kernel log (dmesg, lines with NVRM)",
    34: "the library that is found is the stub of a toolkit: take its folder out of LD_LIBRARY_PATH",
    46: "the GPU is busy or in exclusive mode: 'nvidia-smi' lists the processes that hold it",
    100: "the driver shows no GPU: run this on the machine with its GPU; where there is one, see 'nvidia-smi', "
    "CUDA_VISIBLE_DEVICES, and whether the container was given it",
    101: "there is no such GPU: see CUDA_VISIBLE_DEVICES",
    802: "the system is not ready: on machines with NVSwitch the service nvidia-fabricmanager must run",
    803: "the driver's library and its kernel module are of different versions: restart the machine, or in a container "
    "take the library from the host",
    804: "the library of a cuda-compat package is found first, and this GPU does not take it: take it out of "
    "LD_LIBRARY_PATH, or install a newer driver",
    805: "the MPS daemon does not answer: start it, or stop using MPS",
    999: "the driver failed for a reason that it does not tell: see 'nvidia-smi', the kernel log (dmesg, lines with "
    "NVRM), and whether the module nvidia_uvm is loaded",
}
_INSUFFICIENT_DRIVER, _NEWER_DRIVER = 35, 36


def startup_fault(code: int, name: str, text: str, *, driver: int, runtime: int) -> str:
    """Return the sentence for an error with which CUDA refused to start.

    Args:
        code, name, text: the error as CUDA tells it.
        driver: version of the driver; 0 where there is none.
        runtime: version of the CUDA runtime that the bindings bring.
    """
    told = f"{name}, {code}: {text}"
    if code in (_INSUFFICIENT_DRIVER, _NEWER_DRIVER):
        if not driver:
            return f"no NVIDIA driver is installed here ({told}); run this on the machine with its GPU"
        wanted = runtime // 1000 * 1000
        return (
            f"the NVIDIA driver is too old ({told}): it is of CUDA {version_text(driver)}, and cuda-bindings, which "
            f"bring CUDA {version_text(runtime)}, need {needs(wanted)}; install a newer driver"
        )
    here = f"driver of CUDA {version_text(driver)}" if driver else "no driver"
    remedy = _REMEDIES.get(code, "see 'nvidia-smi'")
    return f"CUDA does not start ({told}; {here}): {remedy}"
