"""Which sizes an operator's kernels take, as data: a list per `launch` module, checked, and generated into the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from seekforge.common.errors import ShapeError

#: A condition on a size, and what it accepts in words.
Condition = tuple[Callable[[int], bool], str]


@dataclass(frozen=True)
class Rule:
    """A condition that holds wherever kernels are compiled, planned or built into an engine.

    Attributes:
        key: the size in the words of config.json, or in words where it has none there.
        symbol: the size in the operator's spec, a static one or one of a call.
        accepts: whether a value is fine. expected: the values in words.
        factor: the spec's size is this many times that of the config.
    """

    key: str
    symbol: str
    accepts: Callable[[int], bool]
    expected: str
    factor: int = 1

    def __str__(self) -> str:
        return f"{self.key} {self.expected}"


def rule(key: str, symbol: str, condition: Condition, *, factor: int = 1) -> Rule:
    """Return a rule."""
    return Rule(key, symbol, *condition, factor)


def one_of(*values: int) -> Condition:
    """Exactly these."""
    words = ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
    return (lambda value: value in values), words


def exactly(only: int, why: str) -> Condition:
    """One value, and the reason for it."""
    return (lambda value: value == only), f"{only} ({why})"


def between(least: int, most: int) -> Condition:
    """Both ends included."""
    return (lambda value: least <= value <= most), f"{least} to {most}"


def multiple(factor: int, why: str) -> Condition:
    """A multiple, and the reason for it."""
    return (lambda value: value % factor == 0), f"a multiple of {factor} ({why})"


def power_of_two(least: int, most: int) -> Condition:
    """A power of two; both ends included."""
    return (lambda value: least <= value <= most and not value & (value - 1)), f"a power of two from {least} to {most}"


def check_rules(op: str, rules: Iterable[Rule], sizes: Mapping[str, Any]) -> None:
    """Compare sizes with rules; a rule on a size that is not there is passed over.

    Raises:
        ShapeError: one is broken. Says what came and what is taken.
    """
    for one in rules:
        if one.symbol in sizes and not one.accepts(value := sizes[one.symbol] // one.factor):
            raise ShapeError(f"{op}: {one.key} is {value}, kernels take {one.expected}")
