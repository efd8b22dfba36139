"""What is installed: three source roots in one namespace, typed, data included, versions pinned."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from seekforge.common.requirements import grouped

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("exporter", "plugins", "runtime")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    """Package -> version of configs/constraints.txt; names as pip compares them."""
    lines = (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(separator for _, separator, _ in found), "a line without =="
    return {canonical(name): version for name, _, version in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    project = PYPROJECT["project"]
    # `trt` installs only where a data-center GPU is
    installed = [
        line for extra in ("export", "cpu", "rtx", "dev", "docs") for line in project["optional-dependencies"][extra]
    ]
    return [line for line in (*project["dependencies"], *installed) if not line.startswith("seekforge[")]


def test_the_three_roots_have_one_and_the_same_init() -> None:
    """Whichever comes first on the path makes the package, and must lead to the other two."""
    texts = {(ROOT / root / "seekforge" / "__init__.py").read_text() for root in SOURCE_ROOTS}
    assert len(texts) == 1
    files = {path.name for root in SOURCE_ROOTS for path in (ROOT / root / "seekforge").iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "names.py"}


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_the_package_is_typed_and_every_folder_of_code_is_a_package(root: str) -> None:
    package = ROOT / root / "seekforge" / root
    assert (package / "py.typed").is_file()
    for folder in {path.parent for path in package.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


@pytest.mark.parametrize("order", list(itertools.permutations(SOURCE_ROOTS)), ids="-".join)
def test_all_three_parts_import_whichever_comes_first(order: tuple[str, ...]) -> None:
    script = (
        "import seekforge, seekforge.exporter, seekforge.plugins, seekforge.runtime, sys\n"
        "from seekforge import LLM, AsyncLLM, SamplingParams, SeekforgeError, __version__\n"
        "assert set(seekforge.__all__) <= set(dir(seekforge)) and __version__\n"
        "assert all(getattr(seekforge, name) is not None for name in seekforge.__all__)\n"
        "try: seekforge.nonsense\n"
        "except AttributeError as error: assert 'SamplingParams' in str(error)\n"
        "print(seekforge.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / root) for root in order)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == ROOT / order[0] / "seekforge" / "__init__.py"


def test_public_names_of_the_runtime_bring_neither_torch_nor_onnx() -> None:
    script = "from seekforge import LLM, AsyncLLM, SamplingParams; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not {"torch", "onnx", "onnxruntime", "pydantic"} & set(done.stdout.split())


def test_python_m_seekforge_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "seekforge", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("seekforge ")


def test_everything_that_make_installs_is_pinned() -> None:
    pinned = pins()
    for requirement in requirements():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name and canonical(name.group()) in pinned, requirement


def test_what_pinned_packages_need_is_pinned_too() -> None:
    pinned = pins()
    for name in pinned:
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of an extra that is not here
            continue
        for one in map(Requirement, lines):
            if one.marker is None:
                assert canonical(one.name) in pinned, f"{name} needs {one}"


def all_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *extras, *PYPROJECT["build-system"]["requires"])]


def test_the_wheel_asks_for_ranges_and_the_pinned_versions_are_in_them() -> None:
    pinned = pins()
    for one in all_requirements():
        if one.name == "seekforge":
            continue
        operators = {part.operator for part in one.specifier}
        assert operators and not operators & {"==", "===", "~="}, f"{one}: exact versions are for constraints.txt"
        if canonical(one.name) in pinned:
            assert one.specifier.contains(pinned[canonical(one.name)]), one


def test_no_two_requirements_bring_the_same_module() -> None:
    extras = grouped({"": PYPROJECT["project"]["dependencies"], **PYPROJECT["project"]["optional-dependencies"]})
    of_extra = {extra: {canonical(one.name) for one in found} for extra, found in extras.items()}
    onnxruntimes = {"onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"}
    for (
        extra,
        found,
    ) in of_extra.items():  # extras that are installed together; ort-cuda is for an environment of its own
        assert len(found & onnxruntimes) < 2, extra
    assert {extra for extra, found in of_extra.items() if "onnxruntime-gpu" in found} == {"ort-cuda"}
    names = set().union(*(found for extra, found in of_extra.items() if extra != "ort-cuda"))
    for module, packages in {
        "onnxruntime": onnxruntimes,
        "triton": {"triton", "triton-windows", "pytorch-triton"},
        "cv2": {"opencv-python", "opencv-python-headless"},
    }.items():
        assert len(names & packages) < 2, f"{module}: {names & packages}"


#: Package -> the module that our code imports of it, where the names differ.
MODULES = {
    "cuda-core": "cuda.core", "cuda-bindings": "cuda.bindings", "pyyaml": "yaml", "onnx-ir": "onnx_ir",
    "tensorrt-rtx": "tensorrt_rtx", "onnxruntime-gpu": "onnxruntime", "nccl4py": "nccl.core",
    "ai-dynamo": "dynamo.common.backend",
    "nvidia-nccl-cu13": "nccl.core",  # the library, which those bindings load
    "flashinfer-python": "flashinfer-python", "nvidia-cuda-nvcc": "nvidia-cuda-nvcc",  # headers and a tool, by package
}  # fmt: skip


def test_every_extra_has_code_that_imports_it() -> None:
    sources = [path.read_text(encoding="utf-8") for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py")]
    for extra, lines in PYPROJECT["project"]["optional-dependencies"].items():
        if extra in ("dev", "docs"):  # tools, which are run
            continue
        for one in map(Requirement, lines):
            module = MODULES.get(canonical(one.name), one.name.replace("-", "_"))
            parent, _, last = module.rpartition(".")
            words = [f"import {module}", f"from {module}", f'"{module}', f"from {parent or module} import {last}"]
            used = one.name == "seekforge" or any(word in text for text in sources for word in words)
            assert used, f"{extra}: nothing imports {module}"


def test_the_pythons_that_are_named_are_the_same_everywhere() -> None:
    wanted = SpecifierSet(PYPROJECT["project"]["requires-python"])
    minors = [minor for minor in range(8, 30) if wanted.contains(f"3.{minor}")]
    classified = [line for line in PYPROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert classified == [f"Programming Language :: Python :: 3.{minor}" for minor in minors]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})" in makefile
    assert all(f"python3.{minor}" in makefile for minor in minors)
    for name in ("README.md", "configs/constraints.txt"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(rf"Python 3\.{minors[0]}(–| to )3\.{minors[-1]}", text), name


def test_pins_name_no_local_build() -> None:
    assert [line for line in pins().values() if "+" in line or "/" in line] == []


@pytest.mark.slow
def test_the_wheel_holds_code_data_and_types(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = [path for root in SOURCE_ROOTS for path in (ROOT / root / "seekforge").rglob("*.py")]
    for path in tracked:
        assert str(path.relative_to(ROOT).relative_to(path.relative_to(ROOT).parts[0])) in names, path
    assert {f"seekforge/{root}/py.typed" for root in SOURCE_ROOTS} <= names
    assert "seekforge/exporter/checkpoint/corpus.txt" in names
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"seekforge/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in names
    assert len(zipfile.ZipFile(wheel).namelist()) == len(names), "a file is in it twice"
    assert {"seekforge/__init__.py", "seekforge/names.py", "seekforge/__main__.py"} <= names
    assert [name for name in names if name.partition("/")[0] not in ("seekforge", "seekforge-0.1.0.dist-info")] == []
