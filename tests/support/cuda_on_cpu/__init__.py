"""CUDA C++ of a library's kernels compiled for the CPU, where lanes take turns, and called by its launch plan.

It shows what a source computes with the library's own headers; it says nothing of a GPU's compiler or of races.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seekforge.plugins.kernels.launch_plan import Buffer, Launch, Variant, library_form, op_kernels, statics_of
from seekforge.plugins.kernels.providers import library
from seekforge.plugins.kernels.providers.compile import PREFIX, sources
from seekforge.plugins.registry import SPECS

_C_TYPES = {"i32": ("int32_t", ctypes.c_int32), "fp32": ("float", ctypes.c_float)}


def compiler() -> str | None:
    """Return a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


class CpuKernels:
    """The kernels of an operator by a provider, compiled once for each set of sizes.

    Args:
        op: ONNX op_type.
        provider: whose.
        folder: where libraries go.
    """

    def __init__(self, op: str, provider: str, folder: Path) -> None:
        assert library_form(op, provider) is not None
        self._op, self._provider, self._folder = op, provider, folder
        self._module = op_kernels(op, provider)
        self._built: dict[tuple[tuple[str, Any], ...], ctypes.CDLL] = {}

    def run(self, inputs: Sequence[Tensor], attrs: Mapping[str, Any], *, sm: int = 90) -> list[Tensor]:
        """Return what the launch plan of an SM computes; outputs are poisoned before."""
        spec = SPECS[self._op]
        bound = spec.bind([tuple(one.shape) for one in inputs], attrs)
        statics = statics_of(self._op, bound, self._provider)
        variants = {one.name: one for one in self._module.variants(statics, sm)}
        dtypes = {"f32": torch.float32, "i32": torch.int32}
        outputs = [
            torch.full(shape, -1, dtype=dtypes[arg.dtype])
            for arg, shape in zip(spec.outputs, spec.output_shapes(bound), strict=True)
        ]
        names = [arg.name for arg in (*spec.inputs, *spec.outputs)]
        tensors = dict(zip(names, [*(one.contiguous() for one in inputs), *outputs], strict=True))
        for launch in self._module.plan(bound, sm).launches:
            self._launch(variants[launch.variant], launch, tensors)
        return outputs

    def _launch(self, variant: Variant, launch: Launch, tensors: Mapping[str, Tensor]) -> None:
        assert launch.grid[1:] == (1, 1)
        values: list[Any] = []
        for name, kind in variant.types.items():
            value = launch.arguments[name]
            if isinstance(value, Buffer):
                values.append(ctypes.c_void_p(tensors[value.name].data_ptr() + value.offset))
            else:
                values.append(_C_TYPES[kind][1](value))
        self._library(variant).run(ctypes.c_int(launch.grid[0]), *values)

    def _library(self, variant: Variant) -> ctypes.CDLL:
        key = tuple(sorted(variant.constants.items()))
        if key not in self._built:
            source, installed = sources(self._op, self._provider)[0], library.find(self._provider)
            kinds = ["void*" if kind.startswith("*") else _C_TYPES[kind][0] for kind in variant.types.values()]
            taken = ", ".join(f"{kind} a{i}" for i, kind in enumerate(kinds))
            given = ", ".join(f"Pointer{{a{i}}}" if kind == "void*" else f"a{i}" for i, kind in enumerate(kinds))
            stem = self._folder / f"kernel{len(self._built)}"
            stem.with_suffix(".cpp").write_text(
                f'#include "cuda_on_cpu.h"\n#include "{source}"\n'
                "struct Pointer {\n  void* at;\n  template <typename T>\n"
                "  operator T*() const { return static_cast<T*>(at); }\n};\n"
                f'extern "C" void run(int blocks, {taken}) {{\n'
                f"  cuda_on_cpu::launch({variant.kernel}, blocks, {variant.num_warps}, {given});\n}}\n"
            )
            macros = [f"-D{PREFIX}{name}={int(value)}" for name, value in variant.constants.items()]
            include = [f"-I{path}" for path in (Path(__file__).parent, installed.headers)]
            command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *macros, *include]
            out = stem.with_suffix(".so")
            subprocess.run([*command, "-o", out, stem.with_suffix(".cpp")], check=True)  # pyright: ignore[reportArgumentType]
            self._built[key] = ctypes.CDLL(str(out))
        return self._built[key]
