"""Frozen records that are read from JSON or YAML and checked. No library but NumPy: the runtime starts with them.

A subclass of `Record` is a frozen dataclass with keyword arguments. Whoever makes one, from a file or in Python, gets
values of the annotated types or a `RecordError` that names the place, what came and what was expected; unknown keys are
errors, and a truth value, a number and a text are never taken for one another. `converter` does the same for an
annotation alone. docs/architecture.md has the numbers by which this was chosen over pydantic and msgspec.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, dataclass_transform

from seekforge.common.reading import parse_json

#: `RecordError.problem` of a key that is not there.
MISSING: Final = "is missing"


class RecordError(ValueError):
    """A value does not fit.

    Attributes:
        path: keys and indices that lead to it, outermost first.
        problem: what came and what was expected.
    """

    def __init__(self, problem: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        key = ".".join(map(str, self.path))
        return f"key {key!r}: {self.problem}" if key else self.problem

    def under(self, key: str | int) -> RecordError:
        """Return the same error, seen from one level further out."""
        return type(self)(self.problem, (key, *self.path))


class UnknownKeyError(RecordError):
    """An object has a key that its record does not; `problem` lists those that it has."""

    @classmethod
    def of(cls, key: str, known: Iterable[str]) -> UnknownKeyError:
        """Return the error for `key` beside the keys that are known, with the one that was perhaps meant."""
        names = list(known)
        close = difflib.get_close_matches(key, names, n=1) if isinstance(key, str) else []
        return cls(f"known: {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else ""), (key,))

    def __str__(self) -> str:
        return f"unknown key {'.'.join(map(str, self.path))!r}, {self.problem}"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
class Record:
    """A frozen record whose unknown keys are errors. A field may be a record, a number, text, a literal, a union, a
    tuple, list or mapping of these, or Any; `Annotated[int, at_least(1)]` is one that a function checks further."""

    model_fields: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.model_fields = {field.name: field for field in dataclasses.fields(made)}

    def __post_init__(self) -> None:
        for name in self.model_fields:
            value = getattr(self, name)
            fitting = _converted(type(self), name, value)
            if fitting is not value:
                object.__setattr__(self, name, fitting)

    @classmethod
    def model_validate(cls, raw: Any) -> Self:
        """Return the record that a decoded JSON object describes.

        Raises:
            RecordError: it describes none.
        """
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            raise RecordError(f"is {shown(raw)}, expected an object with the keys {', '.join(cls.model_fields)}")
        for key in raw:
            if key not in cls.model_fields:
                raise UnknownKeyError.of(key, cls.model_fields)
        cls._check_complete(raw)
        return cls(**raw)

    @classmethod
    def _check_complete(cls, raw: Mapping[str, Any]) -> None:
        """Refuse an object without a key that it must have; a wrong value before that key is said first."""
        earlier: list[str] = []
        for name, field in cls.model_fields.items():
            if name in raw:
                earlier.append(name)
            elif field.default is field.default_factory is dataclasses.MISSING:
                for one in earlier:
                    _converted(cls, one, raw[one])
                raise RecordError(MISSING, (name,))

    @classmethod
    def model_validate_json(cls, text: str) -> Self:
        """Return the record that JSON describes.

        Raises:
            RecordError: it describes none, or is no JSON.
        """
        try:
            raw = parse_json(text)
        except ValueError as error:
            raise RecordError(f"not valid JSON ({error})") from None
        return cls.model_validate(raw)

    def model_dump(self, *, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """Return the fields as plain values, records as dicts; with mode "json", tuples as lists."""
        return {name: _plain(getattr(self, name), mode == "json") for name in self.model_fields}

    def model_dump_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False)

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Return a copy with other values of some fields, checked."""
        return dataclasses.replace(self, **update)  # pyright: ignore[reportArgumentType] - a dataclass by its subclass


class OpenRecord(Record):
    """A record that keeps the keys that it does not know, as they came: those of a format that others own.

    Attributes:
        model_extra: key -> value of those that are no fields; the dumps have them behind the fields.
    """

    model_extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.model_fields = {name: field for name, field in cls.model_fields.items() if name != "model_extra"}

    @classmethod
    def model_validate(cls, raw: Any) -> Self:
        """Return the record that a decoded JSON object describes; see `Record.model_validate`."""
        if isinstance(raw, cls) or not isinstance(raw, dict):
            return super().model_validate(raw)
        cls._check_complete(raw)
        fields = {key: value for key, value in raw.items() if key in cls.model_fields}
        extra = {key: value for key, value in raw.items() if key not in cls.model_fields}
        return cls(**fields, model_extra=extra)

    def model_dump(self, *, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """Return the fields and the other keys as plain values; see `Record.model_dump`."""
        return super().model_dump(mode=mode) | _plain(self.model_extra, mode == "json")


def _plain(value: Any, as_json: bool) -> Any:
    if isinstance(value, Record):
        return value.model_dump(mode="json" if as_json else "python")
    if isinstance(value, dict):
        return {key: _plain(one, as_json) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        plain = [_plain(one, as_json) for one in value]
        return plain if as_json or isinstance(value, list) else tuple(plain)
    return value


_Convert = Callable[[Any], Any]


@functools.cache
def _converters(cls: type[Record]) -> dict[str, _Convert]:
    """Return what makes a fitting value of each field, or raises; worked out when a class is first used."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: converter(hints[name]) for name in cls.model_fields}


def _converted(cls: type[Record], name: str, value: Any) -> Any:
    try:
        return _converters(cls)[name](value)
    except RecordError as error:
        raise error.under(name) from None


def converter(hint: Any) -> Callable[[Any], Any]:
    """Return the function that makes a value of an annotation of whatever came, or raises a `RecordError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda value: value
    if origin is Annotated:
        return functools.partial(_further, converter(arguments[0]), arguments[1:])
    if origin is Literal:
        return functools.partial(_one_of, arguments)
    if origin in (typing.Union, types.UnionType):
        return functools.partial(_union, [(one, converter(one)) for one in arguments])
    if origin in (tuple, list):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return functools.partial(_fixed, [converter(one) for one in arguments])
        return functools.partial(_sequence, origin, converter(arguments[0]))
    if origin is dict:
        return functools.partial(_mapping, converter(arguments[0]), converter(arguments[1]))
    if origin is Callable:
        return _callable
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.model_validate
    return _SIMPLE[hint]


def _further(convert: _Convert, checks: tuple[_Convert, ...], value: Any) -> Any:
    value = convert(value)
    for check in checks:
        value = check(value)
    return value


def at_least(least: int, most: int = 2**63 - 1) -> Callable[[int], int]:
    """Return the check of a field that is a whole number from `least` to `most`: `Annotated[int, at_least(1)]`."""

    def check(value: int) -> int:
        if not least <= value <= most:
            expected = f"at least {least}" if value < least else f"at most {most}"
            raise RecordError(f"is {shown(value)}, expected {expected}")
        return value

    return check


#: A length, a number of things, a place: 0 or more.
Size = Annotated[int, at_least(0)]
#: At least one.
Positive = Annotated[int, at_least(1)]


def finite(value: float) -> float:
    """The check of a field that is neither NaN nor infinite: `Annotated[float, finite]`."""
    if not math.isfinite(value):
        raise RecordError(f"is {value}, expected a finite number")
    return value


def above_zero(most: float = math.inf) -> Callable[[float], float]:
    """Return the check of a field that is a finite number above 0, `most` at most: `Annotated[float, above_zero()]`."""

    def check(value: float) -> float:
        if finite(value) <= 0:
            raise RecordError(f"is {value}, expected a number above 0")
        if value > most:
            raise RecordError(f"is {value}, expected at most {most:g}")
        return value

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RecordError(f"is {shown(value)}, expected text")
    return value


def _integer(value: Any) -> int:
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise RecordError(f"is {shown(value)}, expected a whole number") from None


def _number(value: Any) -> float:
    if type(value) is float:
        return value
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RecordError(f"is {shown(value)}, expected a number") from None


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecordError(f"is {shown(value)}, expected true or false")
    return value


def _nothing(value: Any) -> None:
    if value is not None:
        raise RecordError(f"is {shown(value)}, expected null")


def _callable(value: Any) -> Any:
    if not callable(value):
        raise RecordError(f"is {shown(value)}, expected a function")
    return value


_SIMPLE: dict[Any, _Convert] = {str: _text, int: _integer, float: _number, bool: _truth, type(None): _nothing}


def _one_of(allowed: tuple[Any, ...], value: Any) -> Any:
    if not any(type(value) is type(one) and value == one for one in allowed):  # True is no 1
        raise RecordError(f"is {shown(value)}, expected one of {', '.join(map(repr, allowed))}")
    return value


def _union(members: list[tuple[Any, _Convert]], value: Any) -> Any:
    for hint, _ in members:  # a value keeps its type where that is one of them: 1 stays an integer beside float
        if type(value) is hint:
            return value
    errors: list[RecordError] = []
    for _, convert in members:
        try:
            return convert(value)
        except RecordError as error:
            errors.append(error)
    # the one that came furthest says most
    raise max(errors, key=lambda error: len(error.path))


def _items(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"is {shown(value)}, expected a list")
    return value


def _sequence(kind: type, convert: _Convert, value: Any) -> Any:
    items = []
    for index, one in enumerate(_items(value)):
        try:
            items.append(convert(one))
        except RecordError as error:
            raise error.under(index) from None
    return kind(items)


def _fixed(converts: list[_Convert], value: Any) -> Any:
    if len(_items(value)) != len(converts):
        raise RecordError(f"has {len(value)} values, expected {len(converts)}")
    items = []
    for index, (convert, one) in enumerate(zip(converts, value, strict=True)):
        try:
            items.append(convert(one))
        except RecordError as error:
            raise error.under(index) from None
    return tuple(items)


def _mapping(key_of: _Convert, convert: _Convert, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise RecordError(f"is {shown(value)}, expected an object")
    entries = {}
    for key, one in value.items():
        try:
            entries[key_of(key)] = convert(one)
        except RecordError as error:
            raise error.under(key) from None
    return entries


class _Short(reprlib.Repr):
    """Shows the beginning of a value: what came may be as large as a file."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length():,} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        return " ".join(super().repr_instance(x, level).split())


def shown(value: Any) -> str:
    """Return a value as messages show it: one line of bounded length."""
    return _Short().repr(value)
