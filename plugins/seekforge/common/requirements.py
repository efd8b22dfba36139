"""What this seekforge needs, by extra, and the command that installs what is missing: the one place that advises `pip`.

The command names the libraries themselves with the ranges of our own metadata. Their names exist however seekforge was
installed: from a wheel, a clone, an editable tree or not at all; its own name need not be known to any index.

What reads metadata is imported where it is used: whatever opens an engine imports this for advice that it never gives,
and 3 MB with it.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from packaging.requirements import Requirement

#: The name that the requirements of an extra call our own extras by.
OURSELVES: Final = "seekforge"
#: Import name -> the package that has it, where the two differ.
_PACKAGE_OF: Final[dict[str, str]] = {
    "dynamo": "ai-dynamo",
    "cuda.core": "cuda-core",
    "cuda.bindings": "cuda-bindings",
    "nccl": "nccl4py",
    "onnx_ir": "onnx-ir",
    "tensorrt_rtx": "tensorrt-rtx",
    "yaml": "pyyaml",
}
#: The packages that have the module `onnxruntime`: without and with CUDA.
ORT_CPU, ORT_CUDA = "onnxruntime", "onnxruntime-gpu"
_PROJECT_FILE: Final = Path(__file__).resolve().parents[3] / "pyproject.toml"

#: Extra -> its requirements, those of extras that it names among them; "" has those of every install.
Requirements = Mapping[str, Sequence["Requirement"]]


@functools.cache
def declared() -> Requirements:
    """Return the requirements of this seekforge: of its source tree if it runs from one, else of what is installed."""
    from importlib import metadata

    project = _project()
    if project.get("name") == OURSELVES:
        return grouped({"": project["dependencies"], **project["optional-dependencies"]})
    try:
        return parse(metadata.requires(OURSELVES) or [])
    except metadata.PackageNotFoundError:
        return {}


def own_version() -> str:
    """Return the version of this seekforge: that of its source tree, marked so, where it is not installed."""
    version = installed(OURSELVES)
    if version is not None:
        return version
    return f"{_project().get('version', '0')}+source"


def _project() -> dict[str, Any]:
    """Return what the project file of a source tree says of it; nothing where there is none."""
    import tomllib

    if not _PROJECT_FILE.is_file():
        return {}
    return tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8")).get("project", {})


def parse(lines: Iterable[str]) -> Requirements:
    """Group the requirement lines of a distribution's metadata by extra."""
    by_extra: dict[str, list[str]] = {"": []}
    for line in lines:
        named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        by_extra.setdefault(named[1] if named else "", []).append(line)
    return grouped(by_extra)


def grouped(by_extra: Mapping[str, Sequence[str]]) -> Requirements:
    """Return requirements by extra, our own extras replaced by what they need.

    A marker that holds here is left out, so that a requirement with a marker is one that this machine cannot have.
    """
    from packaging.requirements import Requirement

    known = {extra: [Requirement(line) for line in lines] for extra, lines in by_extra.items()}
    for extra, parsed in known.items():
        for one in parsed:
            if one.marker is not None and one.marker.evaluate({"extra": extra}):
                one.marker = None

    def expand(extra: str) -> list[Requirement]:
        requirements: list[Requirement] = []
        for one in known.get(extra, []):
            inner = [part for name in sorted(one.extras) for part in expand(name)]
            requirements += [part for part in (inner if one.name == OURSELVES else [one]) if part not in requirements]
        return requirements

    return {extra: expand(extra) for extra in known}


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def onnxruntime_package(version_of: Callable[[str], str | None] = installed) -> str:
    """Return the package that has the module `onnxruntime` here, that of the CPU where there is none."""
    return ORT_CUDA if version_of(ORT_CUDA) and not version_of(ORT_CPU) else ORT_CPU


def onnxruntime_conflict(version_of: Callable[[str], str | None] = installed) -> str:
    """Return why ONNX Runtime cannot be trusted here: both of its packages are installed. Empty where one is."""
    cpu, cuda = version_of(ORT_CPU), version_of(ORT_CUDA)
    if not cpu or not cuda:
        return ""
    return (
        f"{ORT_CPU} {cpu} and {ORT_CUDA} {cuda} are both installed and overwrite each other's files; "
        f"pip uninstall --yes {ORT_CPU} {ORT_CUDA}, then install the one that is wanted"
    )


def fault(requirement: Requirement, version: str | None) -> str:
    """Return what is wrong with an installed version; nothing if it will do. A local build is its version."""
    from packaging.version import InvalidVersion, Version

    if requirement.marker is not None:
        return f"{requirement.name} does not exist for {platform.system()}"
    if version is None:
        return f"{requirement.name} is not installed"
    try:
        good = requirement.specifier.contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        good = False
    return "" if good else f"{requirement.name} is {version}, needs {_range(requirement)}"


def lacking(
    extras: Iterable[str],
    *,
    requirements: Requirements | None = None,
    version_of: Callable[[str], str | None] = installed,
) -> list[Requirement]:
    """Return the requirements of extras that are absent or have another version than needed, each once."""
    wanted = declared() if requirements is None else requirements
    missing: list[Requirement] = []
    for one in (one for extra in extras for one in wanted.get(extra, ())):
        if fault(one, version_of(one.name)) and one not in missing:
            missing.append(one)
    return missing


def command(requirements: Iterable[Requirement]) -> str:
    """Return the command that installs what this machine can have of requirements; nothing for none. For a shell."""
    specs = [f"'{one.name}{_extras(one)}{_range(one)}'" for one in requirements if one.marker is None]
    return f"pip install {' '.join(specs)}" if specs else ""


def install(*extras: str) -> str:
    """Return the command that brings what extras lack here, all that they need if nothing seems to lack.

    Where this machine cannot have any of it, a sentence says so.
    """
    wanted = lacking(extras) or list(dict.fromkeys(one for extra in extras for one in declared()[extra]))
    return command(wanted) or "; ".join(fault(one, None) for one in wanted)


def install_module(module: str) -> str:
    """Return the command that installs a module and what else its extra lacks, or nothing if no extra has it."""
    from packaging.utils import canonicalize_name

    head, _, rest = module.partition(".")
    package = _PACKAGE_OF.get(f"{head}.{rest.partition('.')[0]}") or _PACKAGE_OF.get(head) or head
    # the smallest extra that has it, in whatever order a wheel's metadata lists them; that of tests has everything
    known = sorted(declared().items(), key=lambda item: (item[0] == "dev", len(item[1])))
    for extra, requirements in known:
        alone = [one for one in requirements if canonicalize_name(one.name) == canonicalize_name(package)]
        if alone:
            return command(dict.fromkeys([*alone, *(lacking([extra]) if extra not in ("", "dev") else [])]))
    return ""


def install_exactly(package: str, version: str) -> str:
    """Return the command for one version of a package that a file names, or nothing if the package is none of ours.

    What comes from a file is not advised blindly: its name could be anybody's.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    declared_names = {canonicalize_name(one.name) for requirements in declared().values() for one in requirements}
    try:
        wanted = Requirement(f"{package}=={Version(version)}")
    except (InvalidRequirement, InvalidVersion):
        return ""
    return command([wanted]) if canonicalize_name(wanted.name) in declared_names and wanted.url is None else ""


def _range(one: Requirement) -> str:
    """Return the versions as people write them, from the lowest to the highest."""
    return ",".join(sorted(map(str, one.specifier), reverse=True))


def _extras(one: Requirement) -> str:
    return f"[{','.join(sorted(one.extras))}]" if one.extras else ""
