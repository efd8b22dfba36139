"""Functions that other programs call: `seekforge.export`, `build`, `plan` and `parity`; the commands call them too.

A function marked as `public` checks its arguments by their annotations before it does anything, with the bounds that
the command line has, and raises a `SeekforgeError` for whatever is the fault of the input or the machine. It prints
nothing: whoever wants to see the stages of its work passes `progress`.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_type_hints

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import MOST, MOST_SEED
from seekforge.common.errors import OptionError, SeekforgeError
from seekforge.common.outputs import OUTPUTS, check_outputs
from seekforge.common.records import RecordError, at_least, converter, finite, shown
from seekforge.formats.parity_steps import Mode
from seekforge.formats.quality import FormName
from seekforge.plugins.faults import as_fault

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

#: Told each stage of work as it begins.
Progress = Callable[[str], object]


def _listed(value: object) -> tuple[object, ...]:
    """Return several values, each once; one alone may stand bare."""
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return (value,)
    values = tuple(value)
    try:
        return tuple(dict.fromkeys(values))
    except TypeError:  # what cannot be looked up is refused by whoever reads it
        return values


def _path(value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise RecordError(f"is {shown(value)}, expected a path")
    path = os.fspath(value)
    if not isinstance(path, str) or "\0" in path or not path:
        raise RecordError(f"is {shown(path)}, expected a path")
    return Path(path)


def _source(value: object) -> str:
    return str(value) if isinstance(value, str) else str(_path(value))


def _settings(value: object) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        try:
            return tuple(f"{key}={json.dumps(one)}" for key, one in value.items())
        except (TypeError, ValueError):
            raise RecordError(f"is {shown(value)}, expected values that JSON has") from None
    return _texts(_listed(value))


def _not_negative(value: float) -> float:
    if finite(value) < 0:
        raise RecordError(f"is {value}, expected at least 0")
    return value


_texts = converter(tuple[str, ...])


def _kernels(value: object) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return _texts(_listed([f"{op}={provider}" for op, provider in value.items()]))
    return _texts(_listed(value))


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
    Precisions = Literal["fp8", "bf16", "nvfp4"] | Sequence[Literal["fp8", "bf16", "nvfp4"]]
    Modes = Mode | Sequence[Mode]
    Forms = FormName | Sequence[FormName]
    Sources = Source | Sequence[Source]
    Settings = Mapping[str, Any] | Sequence[str]
    Kernels = bool | str | Mapping[str, str] | Sequence[str]
else:  # what a function gets
    Flag = bool
    Count = Annotated[int, at_least(1, MOST)]
    Bytes = Annotated[int, at_least(0)]
    Size = Annotated[int, at_least(1)]
    Threads = Annotated[int, at_least(1, 4096)]
    Seed = Annotated[int, at_least(0, MOST_SEED)]
    NotNegative = Annotated[float, _not_negative]
    AnyPath = Annotated[Any, _path]
    Source = Annotated[Any, _source]
    Paths = Annotated[Any, _listed, converter(tuple[AnyPath, ...])]
    Counts = Annotated[Any, _listed, converter(tuple[Count, ...])]
    Names = Annotated[Any, _listed, _texts]
    Precisions = Annotated[Any, _listed, converter(tuple[Literal["fp8", "bf16", "nvfp4"], ...])]
    Modes = Annotated[Any, _listed, converter(tuple[Mode, ...])]
    Forms = Annotated[Any, _listed, converter(tuple[FormName, ...])]
    Sources = Annotated[Any, _listed, converter(tuple[Source, ...])]
    Settings = Annotated[Any, _settings]
    Kernels = Annotated[Any, _kernels]


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
    def readers() -> dict[str, Callable[[Any], Any]]:
        hints = get_type_hints(function, include_extras=True)
        return {name: converter(hints[name]) for name in signature.parameters}

    @functools.cache
    def inputs() -> list[str]:
        hints = get_type_hints(function, include_extras=True)
        return [name for name in signature.parameters if name not in OUTPUTS and _names_places(hints[name])]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, read in readers().items():
            try:
                bound.arguments[name] = read(bound.arguments[name])
            except RecordError as error:
                place = name + "".join(f"[{part}]" for part in error.path)
                raise OptionError(f"{function.__name__}: {place} {error.problem}") from None
        try:
            check_outputs(bound.arguments, _flat(bound.arguments[name] for name in inputs()))
            return function(*bound.args, **bound.kwargs)
        except SeekforgeError:
            raise
        except (ModuleNotFoundError, MemoryError, OSError, EOFError, ValueError) as error:
            fault = as_fault(error, function.__name__)
            if fault is None:
                raise
            raise fault from error

    return call


def _names_places(annotation: object) -> bool:
    """Whether an argument may be one path or several, or lead to them."""
    return annotation in (AnyPath, Source, Paths, Sources) or any(map(_names_places, get_args(annotation)))


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)
