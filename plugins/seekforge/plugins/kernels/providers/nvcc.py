"""NVIDIA's compiler: which one is used, and a source file of ours compiled to a cubin with one kernel. Needs no GPU."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from seekforge.common.errors import EnvironmentFault, TargetError
from seekforge.common.requirements import command, declared
from seekforge.common.temporary import temporary_folder

#: The first version that compiles for every SM that has kernels.
_LEAST: Final = (12, 9)
#: Where NVIDIA's packages have it, below their common folder: of CUDA 13 and of CUDA 12.
_PACKAGED: Final = ("cu13/bin/nvcc", "cuda_nvcc/bin/nvcc")
#: Packages of the extra that bring the compiler.
_PACKAGES: Final = ("nvidia-cuda-nvcc",)
_VERSION: Final = re.compile(r"release \d+\.\d+, V(\d+\.\d+\.\d+)")
_ENOUGH_S: Final = 600


@dataclass(frozen=True)
class Nvcc:
    """The compiler: its file and its version, such as `13.0.88`."""

    path: Path
    version: str


def find(extra: str) -> Nvcc:
    """Return the compiler: that of CUDA_HOME or CUDA_PATH where one is set, else of PATH, else of NVIDIA's packages.

    Args:
        extra: what has the packages, for the message.

    Raises:
        EnvironmentFault: there is none, it does not tell its version, or is older than 12.9.
    """
    path = _path(extra)
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_ENOUGH_S, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentFault(f"{path}: does not run ({error})") from None
    match = _VERSION.search(said)
    if match is None:
        raise EnvironmentFault(f"{path}: tells no version of nvcc with --version")
    if tuple(map(int, match[1].split(".")))[:2] < _LEAST:
        raise EnvironmentFault(
            f"{path}: is nvcc {match[1]}, needs {'.'.join(map(str, _LEAST))} or later; {_install(extra)}"
        )
    return Nvcc(path, match[1])


def _path(extra: str) -> Path:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            path = Path(home) / "bin" / "nvcc"
            if not path.is_file():
                raise EnvironmentFault(f"{name} is {home}, which has no bin/nvcc; set it to a toolkit, or unset it")
            return path
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    spec = importlib.machinery.PathFinder.find_spec("nvidia", sys.path)
    for folder in [] if spec is None else spec.submodule_search_locations or ():
        for name in _PACKAGED:
            if (path := Path(folder) / name).is_file():
                return path
    raise EnvironmentFault(
        f"nvcc is not found in CUDA_HOME, PATH or NVIDIA's packages, and kernels of provider {extra} are compiled with "
        f"it; {_install(extra)}"
    )


def _install(extra: str) -> str:
    wanted = [one for one in declared().get(extra, ()) if one.name in _PACKAGES]
    return command(wanted) or "install a CUDA toolkit"


def compile_source(
    nvcc: Nvcc,
    source: Path,
    *,
    entry: str,
    macros: Mapping[str, int],
    include: Sequence[Path],
    sm: int,
) -> bytes:
    """Return the cubin of one kernel.

    Args:
        nvcc: the compiler.
        source: a file of this package.
        entry: the kernel, an `extern "C"` symbol; others of the headers are left out of the cubin.
        macros: name -> value.
        include: folders of headers, searched before those of the compiler.
        sm: compute capability.

    Raises:
        TargetError: it does not compile. Says the first error.
    """
    with temporary_folder("seekforge-nvcc") as folder:
        out = folder / "kernel.cubin"
        made = subprocess.run(
            [
                nvcc.path, "-cubin", f"-arch=sm_{sm}", "-std=c++17", "-O3", "--fmad=true",
                f"-Xptxas=--entry,{entry}",
                *(f"-D{name}={value}" for name, value in macros.items()),
                *(f"-I{path}" for path in include),
                "-o", out, source,
            ],
            cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_ENOUGH_S, check=False,
        )  # fmt: skip
        if made.returncode or not out.is_file():
            lines = [line.strip() for line in f"{made.stderr}\n{made.stdout}".splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), None)
            said = (first or (lines or ["no message"])[-1])[:400]
            hint = "; it needs a host C++ compiler, such as g++, in PATH" if "host compiler" in said else ""
            raise TargetError(f"nvcc {nvcc.version} ended with {made.returncode}: {said}{hint}")
        return out.read_bytes()


def _environment() -> dict[str, str]:
    """Return the environment without what adds options that no digest would know of."""
    hidden = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in hidden}
