"""`seekforge doctor`: what is installed here, what can be done with it, and the command for what is missing.

Versions come from package metadata: nothing heavy is imported, and a broken installation cannot break this command.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from seekforge.plugins.formats.yaml_file import read_yaml
from seekforge.plugins.requirements import Requirements, command, declared, fault, installed, lacking
from seekforge.runtime.backends import BACKENDS, EXTRA_OF_BACKEND

_PACKAGES = (
    "seekforge",
    "numpy",
    "tokenizers",
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
    "triton",
    "llguidance",
    "transformers",
)


@dataclass(frozen=True)
class Capability:
    """One thing that seekforge does.

    Attributes:
        name: what it is.
        ready: whether it can be done here.
        missing: why not; empty when ready.
        remedy: the command that changes it; empty when ready or when there is none.
    """

    name: str
    ready: bool
    missing: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        versions: package or component -> version, None when absent.
        gpus: "name, driver, compute capability" of each.
        capabilities: what can be done.
    """

    versions: dict[str, str | None]
    gpus: tuple[str, ...]
    capabilities: tuple[Capability, ...]


def capability(
    name: str,
    extras: tuple[str, ...],
    requirements: Requirements,
    version_of: Callable[[str], str | None] = installed,
) -> Capability:
    """Judge one capability that needs `extras`."""
    wanted = lacking(extras, requirements=requirements, version_of=version_of)
    if not wanted:
        return Capability(name, True)
    faults = (fault(one, version_of(one.name)) for one in wanted)
    return Capability(name, False, "; ".join(faults), command(wanted))


def examine() -> Report:
    """Look at this machine."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {package: installed(package) for package in _PACKAGES}
    gpus = _gpus()
    versions["NVIDIA driver"] = gpus[0].split(", ")[1] if gpus else None
    requirements = declared()
    if not requirements:
        missing = "seekforge is not installed, and its pyproject.toml is not here: nothing says what it needs"
        capabilities = [Capability("everything", False, missing)]
    else:
        capabilities = [capability("export a checkpoint", ("export",), requirements)]
        for target, backend in _targets().items():
            capabilities += target_capabilities(target, backend, requirements, has_gpu=bool(gpus))
    return Report(versions, gpus, tuple(capabilities))


def target_capabilities(
    target: str,
    backend: str,
    requirements: Requirements,
    version_of: Callable[[str], str | None] = installed,
    *,
    has_gpu: bool,
) -> list[Capability]:
    """Judge building for one target and running on it.

    Args:
        target: its name.
        backend: of its file.
        requirements: of this distribution, by extra.
        version_of: package -> installed version or None.
        has_gpu: whether a GPU answers here.
    """
    build, run = f"build for {target}", f"run on {target}"
    if backend not in BACKENDS:
        missing = f"this version of seekforge has no {backend} backend"
        return [Capability(build, False, missing), Capability(run, False, missing)]
    extra = EXTRA_OF_BACKEND[backend]
    running = capability(run, (extra,), requirements, version_of)
    if backend == "onnxruntime":
        return [capability(build, ("export", extra), requirements, version_of), running]
    building = capability(build, ("export", extra, "kernels"), requirements, version_of)
    if not has_gpu:
        if backend == "tensorrt" and building.ready:
            building = Capability(build, False, "no NVIDIA GPU here; TensorRT builds on the GPU that the engine is for")
        running = Capability(run, False, "no NVIDIA GPU here")
    return [building, running]


def _targets() -> dict[str, str]:
    """Target name -> backend, from the target files in the source tree or in the installed package."""
    here = Path(__file__).resolve()
    targets = {"cpu": "onnxruntime"}
    for root in (here.parents[3], here.parents[1]):
        folder = root / "configs" / "targets"
        if folder.is_dir():
            for path in sorted(folder.glob("*.yaml")):
                data = read_yaml(path)
                targets[path.stem] = str(data.get("backend", "unknown")) if isinstance(data, dict) else "unknown"
            break
    return targets


def _gpus() -> tuple[str, ...]:
    """Ask nvidia-smi; no answer means no GPU that could be used."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.count(", ") == 2)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show versions, what can be exported, built and run here, and the command for what is missing."""
    report = examine()
    if as_json:
        click.echo(json.dumps(asdict(report), indent=1))
        return
    width = max(map(len, report.versions))
    for name, found in report.versions.items():
        click.echo(f"{name:<{width}}  {found or '-'}")
    for gpu in report.gpus:
        click.echo(f"{'GPU':<{width}}  {gpu}")
    click.echo()
    width = max(len(item.name) for item in report.capabilities)
    for item in report.capabilities:
        click.echo(f"{item.name:<{width}}  {'ready' if item.ready else f'no: {item.missing}'}")
        if item.remedy:
            click.echo(f"{'':<{width}}  -> {item.remedy}")
