"""Where ONNX Runtime runs an engine: on the CPU, or through its CUDA provider with caches and inputs on the GPU.

Two packages have the module `onnxruntime`, one without and one with CUDA; side by side they overwrite each other's
files. And where CUDA does not start, ONNX Runtime runs everything on the CPU and only its log says so. Both end here as
one sentence, before a request is taken.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnxruntime as ort

from seekforge.common.dtypes import ONNX
from seekforge.common.errors import EnvironmentFault
from seekforge.common.requirements import install, onnxruntime_conflict
from seekforge.formats.engine.manifest import Manifest

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"
#: f32 products stay f32: TF32, which the provider takes where it can, keeps 10 bits of 23 and fails the self-check.
CUDA_OPTIONS: Final = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


@dataclass(frozen=True)
class OrtDevice:
    """One provider and the memory of its values.

    Attributes:
        provider: name of the provider.
        memory: what ONNX Runtime calls the device of its values: cpu or cuda.
        holds_inputs: whether step inputs are copied into values of the device; those of a CPU are bound where they are.
        options: options of the provider.
        missing: what the package said of libraries that it needs and did not find.
    """

    provider: str = CPU_PROVIDER
    memory: str = "cpu"
    holds_inputs: bool = False
    options: Mapping[str, str] | None = None
    missing: str = ""

    @property
    def providers(self) -> list[str | tuple[str, dict[str, str]]]:
        """What a session is opened with: operators without a kernel of the provider run on the CPU."""
        if self.provider == CPU_PROVIDER:
            return [CPU_PROVIDER]
        return [(self.provider, dict(self.options or {})), CPU_PROVIDER]

    def check(self, opened: Sequence[str]) -> None:
        """Refuse a session that does not run where it was asked to.

        Args:
            opened: the session's providers, in their order.

        Raises:
            EnvironmentFault: the provider is not the first of them.
        """
        if list(opened[:1]) != [self.provider]:
            why = self.missing or "it does not say which"
            raise EnvironmentFault(
                f"ONNX Runtime {ort.__version__} fell back from {self.provider} to {', '.join(opened) or 'nothing'}: "
                f"there is no CUDA device ('nvidia-smi' lists them), or it lacks a library ({why}); "
                f"{install('ort-cuda')}, or build the engine for --target cpu to run it here"
            )

    def value(self, array: np.ndarray, dtype: str, before: ort.OrtValue | None = None) -> ort.OrtValue:
        """Return a value of the device that holds `array`.

        Args:
            array: contiguous; a dtype that NumPy lacks is stored as its bits.
            dtype: its element type, by our names.
            before: a value of the device to write into; another shape or type: a new value.
        """
        if before is not None and tuple(before.shape()) == array.shape:
            before.update_inplace(array)
            return before
        if self.memory == "cpu":
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX[dtype])
        return ort.OrtValue.ortvalue_from_numpy(array, self.memory, 0)


def device_of(manifest: Manifest, *, providers: Sequence[str] | None = None) -> OrtDevice:
    """Return where an engine runs.

    Args:
        manifest: the manifest of the engine.
        providers: what this ONNX Runtime was built with; None asks it.

    Raises:
        EnvironmentFault: it asks for CUDA, and the package here has none or lies beside the other one.
    """
    if manifest.target.provider != "cuda":
        return OrtDevice()
    conflict = onnxruntime_conflict()
    if conflict:
        raise EnvironmentFault(f"target {manifest.target.name}: {conflict}")
    known = ort.get_available_providers() if providers is None else providers
    if CUDA_PROVIDER not in known:
        raise EnvironmentFault(
            f"target {manifest.target.name} needs {CUDA_PROVIDER}, the onnxruntime {ort.__version__} here has "
            f"{', '.join(known)}; in an environment without onnxruntime: {install('ort-cuda')}"
        )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        ort.preload_dlls()  # those of CUDA that packages brought
    missing = said.getvalue().partition("\n")[0].partition(": ")[0]
    ort.set_default_logger_severity(4)  # several lines about what `check` says in one
    return OrtDevice(CUDA_PROVIDER, "cuda", holds_inputs=True, options=CUDA_OPTIONS, missing=missing)
