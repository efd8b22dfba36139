"""What this machine lacks for a build: a dry run says it, since a build may be planned where it is not done."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from seekforge.common.errors import EnvironmentFault

if TYPE_CHECKING:
    from seekforge.exporter.builder.options import BuildOptions
    from seekforge.exporter.builder.tensorrt.check import GpuBuild, Inputs


def missing_here(inputs: Inputs, checked: GpuBuild, options: BuildOptions) -> list[str]:
    """Return what this machine lacks for the build of an engine for a GPU, one sentence each.

    Raises:
        ShapeError: there are no kernels for the model's sizes, on no machine.
    """
    from seekforge.exporter.builder.tensorrt.kernels import kernel_tasks
    from seekforge.plugins.tensorrt.library import load

    target = checked.target
    assert target.backend != "onnxruntime" and target.sm is not None
    missing = []
    try:
        load(target.backend)
    except EnvironmentFault as error:
        missing.append(str(error))
    if target.backend == "tensorrt" and target.sm not in sms_here():
        missing.append(f"no GPU of sm{target.sm} here; TensorRT measures on the GPU that it builds for")
    if options.tensorrt.kernels:
        try:
            kernel_tasks(inputs.program, inputs.config, target, checked.plugins, options.tensorrt.providers, dry=True)
        except EnvironmentFault as error:
            missing.append(str(error))
    return missing


def sms_here() -> list[int]:
    """Ask nvidia-smi for the SMs of the GPUs here; none where there is no answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    question = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            question, capture_output=True, text=True, errors="replace", timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line.replace(".", "")) for line in answer.split() if line.replace(".", "").isdigit()]
