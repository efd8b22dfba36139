"""What is installed: three source roots in one namespace, typed, data included, versions pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
    # `trt` installs only where a data-centre GPU is, and `serve` has nothing to run yet
    installed = [line for extra in ("export", "cpu", "rtx", "dev") for line in project["optional-dependencies"][extra]]
    return [line for line in (*project["dependencies"], *installed) if not line.startswith("seekforge[")]


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_the_namespace_stays_open(root: str) -> None:
    namespace = ROOT / root / "seekforge"
    assert not (namespace / "__init__.py").exists(), "it would hide the other two source roots"
    assert [path.name for path in namespace.iterdir() if path.is_file()] == []


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_the_package_is_typed_and_every_folder_of_code_is_a_package(root: str) -> None:
    package = ROOT / root / "seekforge" / root
    assert (package / "py.typed").is_file()
    for folder in {path.parent for path in package.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


def test_all_three_parts_import_from_one_namespace() -> None:
    script = "import seekforge.exporter, seekforge.plugins, seekforge.runtime, seekforge\nassert not seekforge.__file__"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_everything_that_make_installs_is_pinned() -> None:
    pinned = pins()
    for requirement in requirements():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name and canonical(name.group()) in pinned, requirement


def test_exact_versions_are_the_same_in_both_files() -> None:
    pinned = pins()
    for requirement in [*requirements(), *PYPROJECT["build-system"]["requires"]]:
        name, exact, version = requirement.partition("==")
        if exact:
            assert pinned[canonical(name)] == version, requirement


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
    assert "seekforge/__init__.py" not in names
    assert [name for name in names if name.partition("/")[0] not in ("seekforge", "seekforge-0.1.0.dist-info")] == []
