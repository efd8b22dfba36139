"""A pretended nvcc and a pretended FlashInfer: what finds them, calls them and refuses them needs neither."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Final

HEADER: Final = "flashinfer/trtllm/fused_moe/RoutingKernelTopK.cuh"


def write_nvcc(home: Path, *, version: str = "13.0.88", message: str = "", cubin: bytes = b"cubin") -> Path:
    """Write a toolkit whose compiler notes its arguments and its flags from outside, and return the note's path.

    Args:
        home: the folder to make, fit for CUDA_HOME.
        version: what `--version` tells.
        message: an error that it ends with; nothing: it writes `cubin`.
        cubin: what it "compiles".
    """
    note, script = home / "called.json", home / "bin" / "nvcc"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"if '--version' in sys.argv: print('Cuda compilation tools, release 13.0, V{version}'); sys.exit()\n"
        f"flags = [name for name in os.environ if name.startswith('NVCC_')]\n"
        f"json.dump([sys.argv[1:], flags, os.getcwd()], open({str(note)!r}, 'w'))\n"
        f"if {message!r}: print('some warning\\n' + {message!r} + '\\nmore', file=sys.stderr); sys.exit(2)\n"
        f"open(sys.argv[sys.argv.index('-o') + 1], 'wb').write({cubin!r})\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return note


def called(note: Path) -> tuple[list[str], list[str], Path]:
    """Return arguments, names of flags in the environment, and working folder of the last call."""
    arguments, flags, folder = json.loads(note.read_text())
    return arguments, flags, Path(folder)


def write_flashinfer(site: Path, *, version: str = "0.7.4", headers: bool = True) -> Path:
    """Write a FlashInfer whose module cannot be imported, and return the folder of its headers."""
    info = site / f"flashinfer_python-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n")
    folder = site / "flashinfer"
    (folder / "data" / "cccl" / "cub").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a library of headers is not imported')\n")
    include = folder / "data" / "include"
    if headers:
        header = include / HEADER
        header.parent.mkdir(parents=True)
        header.write_text('#include <cub/cub.cuh>\n  #  include "flashinfer/inner.cuh"\n')
        (include / "flashinfer" / "inner.cuh").write_text(f'// inner\n#include "{HEADER}"\n')
        (include / "flashinfer" / "other.cuh").write_text("// other\n")
    return include
