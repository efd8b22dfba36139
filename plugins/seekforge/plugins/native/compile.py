"""Compile the library of CPU operators with the C++ compiler of this machine.

Only the standard library is imported, and nothing of seekforge: the build backend loads this file by its path.
The library bears the digest of its sources in its name, so one that older sources made is not found.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

#: plugins/seekforge/plugins: where operators' folders are.
PLUGINS = Path(__file__).resolve().parents[1]
#: Where the compiled library lies.
FOLDER = Path(__file__).resolve().parent
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", f"-I{FOLDER}")
#: Symbol of the loops -> floats of a vector, and the options that have such vectors.
_X86_64: dict[str, tuple[int, tuple[str, ...]]] = {
    "kernels_avx2": (8, ("-mavx2", "-mfma")),
    "kernels_avx512": (16, ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma")),
}


def sources() -> list[Path]:
    """Return the C++ files, headers included, in a fixed order."""
    return sorted([*FOLDER.glob("*.[ch]pp"), *PLUGINS.glob("*/cpu/*.[ch]pp")])


def library_path() -> Path:
    """Return where the library of these sources lies, if it was compiled."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return FOLDER / f"seekforge_cpu.{digest.hexdigest()[:12]}.so"


def compiler() -> str | None:
    """Return the C++ compiler: `CXX` of the environment, else g++, clang++ or c++; None where there is none."""
    named = os.environ.get("CXX")
    return named or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def compiled_library() -> Path:
    """Return the library of these sources: the one that lies there, or a new one.

    It is compiled again where this file, which has the options, is newer, and where `CXX` names the compiler.

    Raises:
        RuntimeError: as of `compile_library`.
    """
    path = library_path()
    if "CXX" not in os.environ and path.is_file() and path.stat().st_mtime >= Path(__file__).stat().st_mtime:
        return path
    return compile_library()


def compile_library(out: Path | None = None) -> Path:
    """Compile the library, and take older ones away.

    Args:
        out: the file to write; None: where it is looked for.

    Returns:
        The file.

    Raises:
        RuntimeError: there is no compiler, it failed, or the operating system is not Linux.
    """
    command = compiler()
    if sys.platform != "linux":
        raise RuntimeError(f"the CPU operators are compiled for Linux, this is {sys.platform}")
    if command is None:
        raise RuntimeError("no C++ compiler: neither CXX is set nor g++, clang++ or c++ on the PATH")
    target = out or library_path()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jobs = [
            [*_OPTIONS, "-c", str(path), "-o", str(folder / f"{path.stem}.o")]
            for path in sources()
            if path.suffix == ".cpp" and path.stem != "kernels"
        ]
        variants: dict[str, tuple[int, tuple[str, ...]]] = {"kernels_baseline": (4, ())}
        if platform.machine() == "x86_64":
            variants |= _X86_64
        for symbol, (lanes, options) in variants.items():
            defined = (f"-DSEEKFORGE_LANES={lanes}", f"-DSEEKFORGE_KERNELS={symbol}")
            file = str(FOLDER / "kernels.cpp")
            jobs.append([*_OPTIONS, *options, *defined, "-c", file, "-o", str(folder / f"{symbol}.o")])
        at_once = os.cpu_count() or 1
        for first in range(0, len(jobs), at_once):
            _run(command, jobs[first : first + at_once])
        linked = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            _run(command, [["-shared", "-s", *(job[-1] for job in jobs), "-o", str(linked)]])
            linked.replace(target)
        finally:
            linked.unlink(missing_ok=True)
    for old in FOLDER.glob("seekforge_cpu.*.so"):
        if old != target and out is None:
            old.unlink(missing_ok=True)
    return target


def _run(command: str, jobs: Sequence[Sequence[str]]) -> None:
    """Run the compiler with each of these arguments, at once."""
    running = [
        subprocess.Popen(
            [*shlex.split(command), *job],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for job in jobs
    ]
    said = [(process.communicate()[1], process.returncode) for process in running]
    for errors, code in said:
        if code:
            lines = errors.strip().splitlines() or [f"exit code {code}"]
            raise RuntimeError(f"{command} failed: {next((line for line in lines if 'error' in line), lines[0])}")


if __name__ == "__main__":
    try:
        print(compile_library())
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
