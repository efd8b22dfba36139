"""The types of the arguments of `LLM`, checked before anything is read. Their ranges depend on the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from os import PathLike
from typing import Any, Concatenate, ParamSpec, TypeVar

from seekforge.common.errors import RequestError
from seekforge.runtime.values import boolean, integer, is_integer, shown

_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")

_INTEGERS = (
    "max_model_len",
    "max_batch_size",
    "max_num_batched_tokens",
    "num_blocks",
    "kv_cache_memory",
    "num_speculative_tokens",
    "threads",
)
_BOOLEANS = ("speculation_off_switch", "prefix_caching", "deterministic", "self_check")
_CALLED = ("on_step", "on_load", "before_load")
#: Options that None does not leave open.
_NEVER_NONE = ("num_speculative_tokens", *_BOOLEANS)


def options_checked(
    plain: Callable[Concatenate[_Self, _Arguments], None],
) -> Callable[Concatenate[_Self, _Arguments], None]:
    """Let a constructor refuse options of the wrong type, as a `RequestError`, before it does anything."""

    @functools.wraps(plain)
    def checked(self: _Self, /, *places: _Arguments.args, **options: _Arguments.kwargs) -> None:
        for name, value in options.items():
            _check(name, value)
        plain(self, *places, **options)

    return checked


def check_place(name: str, value: object) -> None:
    """Refuse what names no folder.

    Raises:
        RequestError: it is no path, an empty one, or one that no file system has.
    """
    text = value.__fspath__() if isinstance(value, PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise RequestError(f"{name} is {shown(value)}, expected the path of a folder")


def _check(name: str, value: Any) -> None:
    if value is None and name not in _NEVER_NONE:
        return
    if name in _INTEGERS:
        if not is_integer(value):
            raise RequestError(f"{name} is {shown(value)}, expected a whole number")
    elif name == "max_waiting":
        integer(name, value, 1)
    elif name in _BOOLEANS:
        boolean(name, value)
    elif name in _CALLED:
        if not callable(value):
            raise RequestError(f"{name} is {shown(value)}, expected a function, or None")
    elif name == "checkpoint":
        check_place(name, value)
