"""Which installed library's headers are used, what of them counts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.pretended_toolkit import HEADER

from seekforge.common.errors import EnvironmentFault
from seekforge.plugins.kernels.providers import library

SOURCE = f'#include <cmath>\n#include "{HEADER}"\n'.encode()


def test_a_library_is_found_without_running_any_of_it(flashinfer: Callable[..., Path]) -> None:
    include = flashinfer()
    installed = library.find("flashinfer")
    assert (installed.package, installed.version, installed.headers) == ("flashinfer-python", "0.7.4", include)
    assert installed.system == (include.parent / "cccl" / "cub",), "folders that it lacks are left out"


def test_headers_count_that_the_source_includes_directly_or_not(flashinfer: Callable[..., Path]) -> None:
    include = flashinfer()
    installed = library.find("flashinfer")
    before = installed.text_digest(SOURCE)
    (include / "flashinfer" / "other.cuh").write_text("// changed\n")
    assert installed.text_digest(SOURCE) == before
    (include / "flashinfer" / "inner.cuh").write_text("// changed\n")
    assert installed.text_digest(SOURCE) != before


@pytest.mark.parametrize(
    ("version", "headers", "words"),
    [
        ("0.6.1", True, "flashinfer-python is 0.6.1, needs .*provider flashinfer include its headers; pip install"),
        ("0.7.9", False, "flashinfer-python 0.7.9 has no folder flashinfer/data/include; pip install"),
    ],
)
def test_a_library_that_was_not_tried_is_refused(
    version: str, headers: bool, words: str, flashinfer: Callable[..., Path]
) -> None:
    flashinfer(version, headers=headers)
    with pytest.raises(EnvironmentFault, match=words) as caught:
        library.find("flashinfer")
    assert "\n" not in str(caught.value)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda package: None)
    with pytest.raises(EnvironmentFault, match=r"flashinfer-python is not installed.*pip install 'flashinfer-python"):
        library.find("flashinfer")
