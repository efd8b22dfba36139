"""`seekforge doctor`: what is installed here, what can be done with it, and the command for what is missing.

Versions come from package metadata: nothing heavy is imported, and a broken installation cannot break this command.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from seekforge.common.cli.options import command, json_option
from seekforge.common.cli.terminal import echo, write_json
from seekforge.common.requirements import (
    ORT_CPU,
    ORT_CUDA,
    Requirements,
    declared,
    fault,
    installed,
    lacking,
    onnxruntime_conflict,
)
from seekforge.common.requirements import command as install_command
from seekforge.common.yaml_file import read_yaml
from seekforge.formats.support import TABLE, TARGETS
from seekforge.formats.weight_recipes.stored import WORDS
from seekforge.plugins.kernels.cuda_driver import KERNELS_NEED, needs, version_of_branch
from seekforge.plugins.native.library import absence
from seekforge.runtime.backends import BACKENDS, extra_of

_PACKAGES = (
    "seekforge",
    "numpy",
    "tokenizers",
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    ORT_CPU,
    ORT_CUDA,
    "tensorrt-rtx",
    "tensorrt",
    "triton",
    "llguidance",
    "uvicorn",
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
        cpu_operators: why engines for the CPU run the bodies in standard operators; empty where the library is.
        capabilities: what can be done.
    """

    versions: dict[str, str | None]
    gpus: tuple[str, ...]
    cpu_operators: str
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
    return Capability(name, False, "; ".join(faults), install_command(wanted))


def examine() -> Report:
    """Look at this machine."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {package: installed(package) for package in _PACKAGES}
    gpus, no_gpu = _gpus()
    versions["NVIDIA driver"] = gpus[0].split(", ")[1] if gpus else None
    requirements = declared()
    if not requirements:
        missing = "seekforge is not installed, and its pyproject.toml is not here: nothing says what it needs"
        capabilities = [Capability("everything", False, missing)]
    else:
        capabilities = [
            capability("export a checkpoint", ("export",), requirements),
            capability("serve an engine", ("serve",), requirements),
        ]
        driver = versions["NVIDIA driver"]
        for target, known in _targets().items():
            capabilities += target_capabilities(
                target,
                known.backend,
                requirements,
                has_gpu=bool(gpus),
                sm=known.sm,
                driver=driver,
                no_gpu=no_gpu,
                provider=known.provider,
            )
    return Report(versions, gpus, absence(), tuple(capabilities))


def target_capabilities(
    target: str,
    backend: str,
    requirements: Requirements,
    version_of: Callable[[str], str | None] = installed,
    *,
    has_gpu: bool,
    sm: int | None = None,
    driver: str | None = None,
    no_gpu: str = "no NVIDIA GPU here",
    provider: str | None = None,
) -> list[Capability]:
    """Judge building for one target and running on it.

    Args:
        target: the name of the target.
        backend: the backend that its file names.
        requirements: the requirements of this distribution, by extra.
        version_of: package -> installed version or None.
        has_gpu: whether a GPU answers here.
        sm: the SM of the target; its kernels need a driver that loads them. None: nothing is said of drivers.
        driver: version of the NVIDIA driver here, such as 580.65.06.
        no_gpu: why none answers.
        provider: which of ONNX Runtime's the target names; None: that of the CPU, or another backend.
    """
    build, run = f"build for {target}", f"run on {target}"
    if backend not in BACKENDS:
        missing = f"this version of seekforge has no {backend} backend"
        return [Capability(build, False, missing), Capability(run, False, missing)]
    if backend == "onnxruntime":
        return _onnxruntime(build, run, provider, requirements, version_of, no_gpu="" if has_gpu else no_gpu)
    extra = extra_of(backend, provider)
    running = capability(run, (extra,), requirements, version_of)
    building = capability(build, ("export", extra, "kernels"), requirements, version_of)
    if not has_gpu:
        if backend == "tensorrt":  # whatever else is missing: installing it here would lead nowhere
            building = Capability(build, False, f"{no_gpu}; TensorRT builds on the GPU that the engine is for")
        wanted = "" if sm is None else f"; it needs {needs(needed_driver(sm, version_of))}"
        running = Capability(run, False, f"{no_gpu}{wanted}")
    elif sm is not None and driver is not None:
        old = driver_fault(sm, driver, version_of)
        if old is not None and running.ready:
            running = Capability(run, False, old)
    return [building, running]


def _onnxruntime(
    build: str,
    run: str,
    provider: str | None,
    requirements: Requirements,
    version_of: Callable[[str], str | None],
    *,
    no_gpu: str,
) -> list[Capability]:
    """Judge a target of ONNX Runtime: either of its packages builds for any and runs on a CPU."""
    conflict = onnxruntime_conflict(version_of)
    if conflict:
        return [Capability(build, False, conflict), Capability(run, False, conflict)]
    here = "ort-cuda" if version_of(ORT_CUDA) else "cpu"
    building = capability(build, ("export", here), requirements, version_of)
    if provider is None:
        return [building, capability(run, (here,), requirements, version_of)]
    if no_gpu:
        return [building, Capability(run, False, no_gpu)]
    running = capability(run, (extra_of("onnxruntime", provider),), requirements, version_of)
    if not running.ready and version_of(ORT_CPU):
        missing = f"{ORT_CUDA} is not installed, and {ORT_CPU} is, beside which it must not lie"
        running = Capability(run, False, missing, f"pip uninstall --yes {ORT_CPU} && {running.remedy}")
    return [building, running]


def needed_driver(sm: int, version_of: Callable[[str], str | None]) -> int:
    """Return the CUDA version that a driver must have for kernels of an SM and for the bindings that are installed.

    Args:
        sm: compute capability.
        version_of: package -> installed version or None.
    """
    return max(KERNELS_NEED.get(sm, 0), _bindings_need(version_of))


def driver_fault(sm: int, driver: str, version_of: Callable[[str], str | None]) -> str | None:
    """Return why a driver is too old to run kernels of an SM, or None where it will do.

    Args:
        sm: compute capability.
        driver: the version of the driver, such as 570.86.15.
        version_of: package -> installed version or None.
    """
    branch = driver.partition(".")[0]
    wanted = needed_driver(sm, version_of)
    if not branch.isdecimal() or version_of_branch(int(branch)) >= wanted:
        return None
    bindings = _bindings_need(version_of) > KERNELS_NEED.get(sm, 0)
    what = f"cuda-bindings {version_of('cuda-bindings')}" if bindings else f"kernels of sm{sm}"
    return f"the NVIDIA driver {driver} is too old: {what} need {needs(wanted)}; install a newer driver"


def _bindings_need(version_of: Callable[[str], str | None]) -> int:
    """Return the CUDA version that the bindings' own runtime needs: any of its major version."""
    major = (version_of("cuda-bindings") or "").partition(".")[0]
    return 1000 * int(major) if major.isdecimal() else 0


@dataclass(frozen=True)
class _Target:
    """What of a target's file decides what it needs."""

    backend: str
    sm: int | None = None
    provider: str | None = None


def _targets() -> dict[str, _Target]:
    """Target name -> what it needs, from the target files in the source tree or in the installed package."""
    here = Path(__file__).resolve()
    targets = {"cpu": _Target("onnxruntime")}
    for root in (here.parents[4], here.parents[2]):
        folder = root / "configs" / "targets"
        if folder.is_dir():
            for path in sorted(folder.glob("*.yaml")):
                data = read_yaml(path)
                known = data if isinstance(data, dict) else {}
                sm, provider = known.get("sm"), known.get("provider")
                targets[path.stem] = _Target(
                    str(known.get("backend", "unknown")),
                    sm if isinstance(sm, int) else None,
                    "cuda" if provider == "cuda" else None,
                )
            break
    return targets


def _gpus() -> tuple[tuple[str, ...], str]:
    """Ask nvidia-smi for the GPUs that could be used; returns them, and why there are none."""
    absent = "no NVIDIA GPU here"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), absent
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"nvidia-smi does not answer ({error})"
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:  # such as a driver whose library and kernel module differ: that is no lack of a GPU
        return (), f"nvidia-smi fails ({said[0] if said else f'exit code {done.returncode}'})"
    return tuple(line for line in said if line.count(", ") == 2), absent


@command("doctor", examples=("seekforge doctor", "seekforge doctor --json"))
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, what can be exported, built and run here, and the command for what is missing."""
    report = examine()
    if as_json:
        write_json(asdict(report) | {"models": [asdict(row) | {"works": row.works} for row in TABLE]}, indent=1)
        return
    installed_versions = {name: version for name, version in report.versions.items() if version}
    width = max(map(len, (*installed_versions, "CPU operators")))
    for name, version in installed_versions.items():
        echo(f"{name:<{width}}  {version}")
    for gpu in report.gpus:
        echo(f"{'GPU':<{width}}  {gpu}")
    operators = f"standard ones, slower: {report.cpu_operators}" if report.cpu_operators else "compiled"
    echo(f"{'CPU operators':<{width}}  {operators}")
    alike: dict[tuple[bool, str, str], list[str]] = {}
    for item in report.capabilities:
        alike.setdefault((item.ready, item.missing, item.remedy), []).append(item.name)
    for (ready, missing, remedy), names in sorted(alike.items(), key=lambda entry: not entry[0][0]):
        echo()
        echo("ready:" if ready else f"not possible, since {missing}{f' ({remedy})' if remedy else ''}:")
        for line in _joined(names):
            echo(f"  {line}")
    echo()
    echo("models and checkpoints (how each was shown: seekforge inspect CHECKPOINT, or docs/index.md):")
    for line in _models():
        echo(f"  {line}")


def _models() -> list[str]:
    """Return for each family and target the forms of checkpoints that engines are built from."""
    forms: dict[tuple[str, str], list[str]] = {}
    for row in TABLE:
        if row.works:
            forms.setdefault((row.family, TARGETS[row.backend]), []).append(WORDS[row.form])
    return [f"{family} for {target}: {'; '.join(words)}" for (family, target), words in forms.items()]


def _joined(names: list[str]) -> list[str]:
    """Return names with a common beginning as one line: `build for a, b`."""
    lines: dict[str, list[str]] = {}
    for name in names:
        what, between, target = name.partition(" for " if " for " in name else " on ")
        lines.setdefault(what + between, []).append(target)
    return [f"{what}{', '.join(filter(None, targets))}" for what, targets in lines.items()]
