"""A library's kernels compiled: what made them, what they are made from, and their cubins."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from seekforge.common.errors import ShapeError
from seekforge.plugins.kernels.launch_plan import Scalar, Variant, library_form
from seekforge.plugins.kernels.providers import library, nvcc
from seekforge.plugins.operator import LibraryForm

#: Before the names of a variant's constants, where they are macros.
PREFIX: Final = "SEEKFORGE_"


def compiler(op: str, provider: str) -> str:
    """Return what compiles an operator's kernels of a library: names, versions, and a digest of the headers.

    Raises:
        EnvironmentFault: nvcc or the library is missing, or is too old.
    """
    installed = library.find(provider)
    headers = installed.text_digest(_source(_form(op, provider)).read_bytes())[:12]
    return f"nvcc {nvcc.find(provider).version} with {installed.package} {installed.version} (headers {headers})"


def sources(op: str, provider: str) -> tuple[Path, ...]:
    """Return our own files that an operator's kernels of a library depend on: device code, and launches."""
    form = _form(op, provider)
    return (_source(form), _module(form))


def compile_library(op: str, variant: Variant, sm: int, provider: str) -> bytes:
    """Return the cubin of a variant for an SM.

    Raises:
        EnvironmentFault: nvcc or the library is missing, or is too old.
        TargetError: it does not compile.
    """
    form, installed = _form(op, provider), library.find(provider)
    return nvcc.compile_source(
        nvcc.find(provider),
        _source(form),
        entry=variant.kernel,
        macros=_macros(variant.constants),
        include=[installed.headers, *installed.system],
        sm=sm,
    )


def _macros(constants: Mapping[str, Scalar]) -> dict[str, int]:
    wrong = {name: value for name, value in constants.items() if not isinstance(value, int)}
    assert not wrong, wrong
    return {PREFIX + name: int(value) for name, value in constants.items()}


def _form(op: str, provider: str) -> LibraryForm:
    form = library_form(op, provider)
    if form is None:
        raise ShapeError(f"{op}: {provider} is no library")
    return form


def _module(form: LibraryForm) -> Path:
    spec = importlib.util.find_spec(form.launch)
    assert spec is not None and spec.origin is not None, form.launch
    return Path(spec.origin)


def _source(form: LibraryForm) -> Path:
    return _module(form).with_name(form.source)
