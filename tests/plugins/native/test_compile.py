"""The library of CPU operators: where it is looked for, what it is made of, and what is said where it is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import seekforge.plugins.native.compile as compiling
import seekforge.plugins.native.library as library
from seekforge.common.errors import EngineError
from seekforge.plugins.native import FUSED
from seekforge.plugins.registry import NATIVE, NATIVE_FORMS


def test_every_operator_of_the_tables_is_in_the_sources_and_no_other() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in compiling.sources() if path.parent.name == "cpu")
    names = set(re.findall(r'"([A-Z][A-Za-z]+)"', text))
    assert names == {*NATIVE, *NATIVE_FORMS, *FUSED}
    made = re.findall(r"const ort::CustomOp\* (\w+)\(\) \{", text)
    listed = (compiling.FOLDER / "library.cpp").read_text(encoding="utf-8")
    assert len(made) == len(names) and all(f"const ort::CustomOp* {name}();" in listed for name in made)


def test_the_sources_are_of_the_standard_that_all_compilers_take() -> None:
    """A lambda takes no structured binding in C++17; g++ lets it pass, clang++ before 16 does not."""
    bindings = [
        path.name for path in compiling.sources() if re.search(r"auto[&\s]*\[", path.read_text(encoding="utf-8"))
    ]
    assert bindings == []


def test_the_sources_compile_with_clang() -> None:
    """With g++ they are compiled when seekforge is installed."""
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    files = [str(path) for path in compiling.sources() if path.suffix == ".cpp"]
    options = (*compiling._OPTIONS, "-fsyntax-only", "-DSEEKFORGE_LANES=4", "-DSEEKFORGE_KERNELS=kernels_baseline")
    done = subprocess.run(["clang++", *options, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_source_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = compiling.library_path()
    changed = tmp_path / "op.hpp"
    changed.write_text("// other\n")
    files = [changed if path.name == changed.name else path for path in compiling.sources()]
    monkeypatch.setattr(compiling, "sources", lambda: files)
    assert compiling.library_path() != before


def test_a_library_is_compiled_once_for_sources_options_and_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, made = tmp_path / "library.so", []

    def compile_library() -> Path:
        made.append(path.write_bytes(b""))
        return path

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling, "library_path", lambda: path)
    monkeypatch.setattr(compiling, "compile_library", compile_library)
    assert compiling.compiled_library() == compiling.compiled_library() == path and len(made) == 1
    os.utime(path, (0, 0))  # older than the file with the options
    assert compiling.compiled_library() == path and len(made) == 2
    monkeypatch.setenv("CXX", "c++")
    assert compiling.compiled_library() == path and len(made) == 3


@pytest.mark.parametrize(
    ("platform", "command", "said"),
    [("darwin", "g++", "compiled for Linux"), ("linux", None, "no C.. compiler"), ("linux", "false", "false failed")],
)
def test_what_cannot_be_compiled_is_one_line(
    platform: str, command: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiling, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(compiling, "compiler", lambda: command)
    with pytest.raises(RuntimeError, match=said):
        compiling.compile_library(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_sessions_without_the_library_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compiled", lambda: None)
    assert not library.add_operators(object()) and "C++ compiler" in library.absence()
    monkeypatch.setattr(library, "compiled", lambda: Path("there.so"))
    monkeypatch.setenv(library.SWITCH, "0")
    assert not library.add_operators(object()) and library.SWITCH in library.absence()


def test_a_library_that_does_not_load_is_an_error_with_its_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> Any:
        raise RuntimeError(f"{path}: wrong\n  format")

    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setattr(library, "compiled", lambda: Path("bad.so"))
    with pytest.raises(EngineError, match=f"bad.so: wrong format.*{library.SWITCH}=0"):
        library.add_operators(SimpleNamespace(register_custom_ops_library=refuse))
