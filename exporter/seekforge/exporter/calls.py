"""Functions that other programs call: `seekforge.export`, `build`, `plan` and `parity`; the commands call them too.

A function marked as `public` checks its arguments by their annotations before it does anything, with the bounds that
the command line has, and raises a `SeekforgeError` for whatever is the fault of the input or the machine. It prints
nothing: whoever wants to see the stages of its work passes `progress`.
"""

from __future__ import annotations

import functools
import inspect
import json
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import MOST, MOST_SEED
from seekforge.common.errors import OptionError, SeekforgeError
from seekforge.common.outputs import OUTPUTS, check_outputs
from seekforge.formats.parity_steps import Mode
from seekforge.plugins.faults import as_fault

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

#: Told each stage of work as it begins.
Progress = Callable[[str], object]


def _whole(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError("expected a whole number")
    return operator.index(value)  # pyright: ignore[reportArgumentType]


def _listed(value: object) -> tuple[object, ...]:
    """Return several values, each once; one alone may be given bare."""
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return (value,)
    given = tuple(value)
    try:
        return tuple(dict.fromkeys(given))
    except TypeError:  # what cannot be looked up is refused by whoever reads it
        return given


def _path(value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("expected a path")
    path = os.fspath(value)
    if not isinstance(path, str) or "\0" in path or not path:
        raise ValueError("expected a path")
    return Path(path)


def _source(value: object) -> str:
    return str(value) if isinstance(value, str) else str(_path(value))


def _settings(value: object) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        try:
            return tuple(f"{key}={json.dumps(one)}" for key, one in value.items())
        except (TypeError, ValueError):
            raise ValueError("expected values that JSON has") from None
    return _listed(value)  # pyright: ignore[reportReturnType]


if TYPE_CHECKING:  # what callers may pass
    Flag = bool
    Count = int
    Bytes = int
    Size = int
    Seed = int
    Threads = int
    NotNegative = float
    AnyPath = str | os.PathLike[str]
    Source = str | os.PathLike[str]
    Paths = AnyPath | Sequence[AnyPath]
    Counts = int | Sequence[int]
    Names = str | Sequence[str]
    Precisions = Literal["fp8", "bf16"] | Sequence[Literal["fp8", "bf16"]]
    Modes = Mode | Sequence[Mode]
    Sources = Source | Sequence[Source]
    Settings = Mapping[str, Any] | Sequence[str]
else:  # what a function gets
    Flag = Annotated[bool, Field(strict=True)]
    Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST)]
    Bytes = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=1 << 63)]
    Size = Annotated[int, BeforeValidator(_whole), Field(ge=1, lt=1 << 63)]
    Threads = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=4096)]
    Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_SEED)]
    NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
    AnyPath = Annotated[Path, BeforeValidator(_path)]
    Source = Annotated[str, BeforeValidator(_source)]
    Paths = Annotated[tuple[AnyPath, ...], BeforeValidator(_listed)]
    Counts = Annotated[tuple[Count, ...], BeforeValidator(_listed)]
    Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
    Precisions = Annotated[tuple[Literal["fp8", "bf16"], ...], BeforeValidator(_listed)]
    Modes = Annotated[tuple[Mode, ...], BeforeValidator(_listed)]
    Sources = Annotated[tuple[Source, ...], BeforeValidator(_listed)]
    Settings = Annotated[tuple[str, ...], BeforeValidator(_settings)]


def many(value: _T | Sequence[_T]) -> tuple[_T, ...]:
    """Return the values of an argument that may be one or several: the tuple that `public` made of it."""
    assert isinstance(value, tuple)
    return value


def stages_of(progress: Progress | None) -> Stages:
    """Return what counts the seconds of each stage: `progress` itself if it is that, else silent, and telling it."""
    return progress if isinstance(progress, Stages) else Stages(quiet=True, listener=progress)


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function check its arguments, and raise errors that callers can catch by `SeekforgeError`.

    Arguments that are named as outputs (`common/outputs.py:OUTPUTS`) are held against the disk and against those that
    the function reads.

    Raises:
        OptionError: an argument is none that its annotation takes. It names the argument.
        OutputError: an output cannot be written, or is read by the same call.
        EnvironmentFault, OutputError: a library is missing, memory or a disk is full.
    """
    signature = inspect.signature(function)

    @functools.cache
    def readers() -> dict[str, TypeAdapter[Any]]:
        hints = get_type_hints(function, include_extras=True)
        return {name: TypeAdapter(hints[name]) for name in signature.parameters}

    @functools.cache
    def inputs() -> list[str]:
        hints = get_type_hints(function, include_extras=True)
        return [name for name in signature.parameters if name not in OUTPUTS and _names_places(hints[name])]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, reader in readers().items():
            try:
                bound.arguments[name] = reader.validate_python(bound.arguments[name])
            except ValidationError as error:
                raise OptionError(f"{function.__name__}: {_fault(name, error)}") from None
        try:
            check_outputs(bound.arguments, _flat(bound.arguments[name] for name in inputs()))
            return function(*bound.args, **bound.kwargs)
        except SeekforgeError:
            raise
        except (ModuleNotFoundError, MemoryError, OSError) as error:
            fault = as_fault(error, function.__name__)
            if fault is None:
                raise
            raise fault from error

    return call


def _names_places(annotation: object) -> bool:
    """Whether an argument may be a path: `AnyPath` and `Source`, or something of them."""
    return annotation in (AnyPath, Source) or any(map(_names_places, get_args(annotation)))


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def _fault(name: str, error: ValidationError) -> str:
    """Say what came and what was expected."""
    first = error.errors(include_url=False)[0]
    place = name + "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    limits = first.get("ctx", {})
    if "ge" in limits:
        expected = f"expected at least {limits['ge']}"
    elif "le" in limits or "lt" in limits:
        expected = f"expected at most {limits.get('le', limits.get('lt', 1) - 1)}"
    else:
        expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return f"{place} is {reprlib.repr(first['input'])}, {expected}"
