"""Advice to install: only names and ranges that exist, whatever way seekforge itself was installed."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from seekforge.common import requirements
from seekforge.common.requirements import (
    command,
    declared,
    fault,
    install,
    install_exactly,
    install_module,
    lacking,
    parse,
)

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [
    "click<9,>=8.2",
    "torch<3,>=2.13; extra == 'export'",
    'onnx-ir<2,>=1.1; extra == "export"',
    "ort>=1; extra == 'cpu'",
    "triton>=3; platform_system == 'Nowhere' and extra == 'kernels'",
    "seekforge[gpu]; extra == 'rtx'",
    "rt>=1; extra == 'rtx'",
    "cuda>=1; extra == 'gpu'",
]


def source_files() -> Iterator[tuple[Path, ast.AST]]:
    for root in ("exporter", "plugins", "runtime"):
        for path in sorted((ROOT / root).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def test_no_message_but_of_the_one_place_advises_pip() -> None:
    found = []
    for path, tree in source_files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "pip install" in node.value:
                found.append((path.name, node.value))
    assert [name for name, _ in found] == ["requirements.py"], found


def advice() -> list[tuple[str, tuple[object, ...]]]:
    """Every call of the functions that advise, with its constant arguments."""
    found = []
    for path, tree in source_files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in (
                "install", "install_module",
            ):  # fmt: skip
                values = tuple(one.value for one in node.args if isinstance(one, ast.Constant))
                found.append((f"{path}: {node.func.id}", values))
    return found


def test_every_advice_is_of_an_extra_or_a_module_that_is_declared() -> None:
    calls = advice()
    assert len(calls) > 8
    for where, values in calls:
        for value in values:
            known = declared() if where.endswith("install") else {}
            assert value in known or install_module(str(value)), f"{where}({value!r})"


@pytest.mark.parametrize("extra", list(EXTRAS))
def test_advice_for_an_extra_names_packages_with_our_ranges(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "lacking", lambda extras: list(declared()[extra]))
    specs = re.findall(r"'([^']*)'", install(extra))
    assert specs and all(Requirement(spec).name != "seekforge" and Requirement(spec).specifier for spec in specs)
    ours = {str(one.specifier) for one in declared()[extra]}
    assert {str(Requirement(spec).specifier) for spec in specs} <= ours


def test_extras_of_our_own_are_replaced_by_what_they_need() -> None:
    wanted = parse(LINES)
    assert [one.name for one in wanted["rtx"]] == ["cuda", "rt"]
    assert [one.name for one in wanted[""]] == ["click"]
    assert [one.name for one in declared()["rtx"]] == ["tensorrt-rtx", "cuda-core", "cuda-bindings"]


def test_only_what_lacks_is_advised() -> None:
    wanted = parse(LINES)
    have = {"torch": "2.14.1+cpu", "ort": "0.9", "rt": "1.0"}.get
    assert command(lacking(["export"], requirements=wanted, version_of=have)) == "pip install 'onnx-ir>=1.1,<2'"
    both = lacking(["export", "cpu", "rtx"], requirements=wanted, version_of=have)
    assert command(both) == "pip install 'onnx-ir>=1.1,<2' 'ort>=1' 'cuda>=1'"
    assert lacking(["rtx"], requirements=wanted, version_of={"rt": "1", "cuda": "2"}.get) == []


def test_what_a_machine_cannot_have_is_said_and_not_advised() -> None:
    wanted = parse(LINES)
    (triton,) = lacking(["kernels"], requirements=wanted, version_of={}.get)
    assert fault(triton, None).startswith("triton does not exist for ")
    assert command([triton]) == ""


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.13.0", ""),
        ("2.13.0+cpu", ""),
        ("2.14.0rc1", ""),
        ("2.12.9", "torch is 2.12.9, needs >=2.13,<3"),
        ("3.0", "torch is 3.0, needs >=2.13,<3"),
        ("nonsense", "torch is nonsense, needs >=2.13,<3"),
        (None, "torch is not installed"),
    ],
)
def test_versions_are_held_against_ranges(version: str | None, said: str) -> None:
    assert fault(Requirement("torch>=2.13,<3"), version) == said


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("onnx.helper", "onnx"),
        ("onnx_ir", "onnx-ir"),
        ("cuda.bindings.runtime", "cuda-bindings"),
        ("tensorrt_rtx", "tensorrt-rtx"),
        ("huggingface_hub", "huggingface_hub"),
        ("yaml.reader", "pyyaml"),
        ("transformers", "transformers"),
        ("onnxruntime.capi", "onnxruntime"),
    ],
)
def test_a_module_is_traced_to_its_package(module: str, package: str) -> None:
    assert install_module(module).startswith(f"pip install '{package}")
    assert install_module("no_such_module") == "" == install_module("seekforge.exporter")


def test_advice_is_the_same_in_whatever_order_extras_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel's metadata sorts them, and `dev`, which has everything, comes early."""
    lines = ["seekforge[export]; extra == 'dev'", "jinja2>=3; extra == 'export'", "torch>=2; extra == 'export'"]
    lines.append("jinja2>=3; extra == 'templates'")

    def absent(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", absent)
    for order in (lines, lines[::-1]):
        monkeypatch.setattr(requirements, "declared", lambda order=order: parse(order))
        assert set(re.findall("'(.*?)'", install_module("torch"))) == {"torch>=2", "jinja2>=3"}
        assert install_module("jinja2.sandbox") == "pip install 'jinja2>=3'"


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("tensorrt-rtx", "1.7.1.116", "pip install 'tensorrt-rtx==1.7.1.116'"),
        ("TensorRT_RTX", "1.7", "pip install 'TensorRT_RTX==1.7'"),
        ("evil-package", "1.0", ""),
        ("tensorrt-rtx @ https://example.org/x.whl", "1", ""),
        ("tensorrt-rtx", "1.0'; rm -rf ~ #", ""),
        ("torch; rm -rf ~", "1.0", ""),
    ],
)
def test_a_package_that_a_file_names_is_advised_only_if_it_is_ours(package: str, version: str, said: str) -> None:
    assert install_exactly(package, version) == said


def test_outside_of_a_source_tree_the_installed_metadata_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requirements, "_PROJECT_FILE", tmp_path / "pyproject.toml")
    monkeypatch.setattr(metadata, "requires", lambda name: LINES)
    declared.cache_clear()
    try:
        assert [one.name for one in declared()["export"]] == ["torch", "onnx-ir"]
        (tmp_path / "pyproject.toml").write_text("[project]\nname = 'another'\n", encoding="utf-8")
        declared.cache_clear()
        assert [one.name for one in declared()["export"]] == ["torch", "onnx-ir"], "somebody else's tree"
    finally:
        declared.cache_clear()


def test_a_source_tree_that_is_not_installed_has_the_version_of_its_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed", lambda package: None)
    version = Version(requirements.own_version())
    assert version.public == PROJECT["version"] and version.local == "source"
    monkeypatch.setattr(requirements, "_PROJECT_FILE", Path("/nowhere"))
    assert Version(requirements.own_version()).local == "source"
