"""Records take what fits their annotations and name what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, field
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from seekforge.common.records import (
    OpenRecord,
    Record,
    RecordError,
    UnknownKeyError,
    above_zero,
    at_least,
    converter,
)


class Inner(Record):
    kind: Literal["a", "b"]
    shape: tuple[int | str, ...]


class Outer(Record):
    count: int
    rate: float = 0.5
    pair: tuple[int, int] = (0, 1)
    inner: Inner | None = None
    named: dict[str, Inner] = field(default_factory=dict)
    mixed: dict[str, float | int | str] = field(default_factory=dict)
    anything: Any = None

    @property
    def double(self) -> int:
        return 2 * self.count


RAW = {
    "count": 3,
    "rate": 2,
    "pair": [4, 5],
    "inner": {"kind": "a", "shape": ["B", 7]},
    "named": {"x": {"kind": "b", "shape": []}},
    "mixed": {"i": 1, "f": 1.0, "s": "1"},
    "anything": [{"free": None}],
}


def test_a_record_reads_what_it_writes() -> None:
    record = Outer.model_validate(RAW)
    assert record.pair == (4, 5) and record.inner is not None and record.inner.shape == ("B", 7)
    assert [type(value) for value in record.mixed.values()] == [int, float, str]
    assert isinstance(record.rate, float) and record.double == 6
    assert record.model_dump(mode="json") == RAW | {"rate": 2.0}
    assert record.model_dump()["pair"] == (4, 5)
    assert Outer.model_validate_json(record.model_dump_json()) == record


def test_values_made_in_python_are_checked_too() -> None:
    record = Outer(count=np.int64(3), rate=np.float32(0.5))  # pyright: ignore[reportArgumentType]
    assert type(record.count) is int and type(record.rate) is float
    assert record.model_copy(update={"count": 4}) == Outer(count=4)
    with pytest.raises(RecordError, match="key 'count': is 'x', expected a whole number"):
        record.model_copy(update={"count": "x"})
    with pytest.raises(FrozenInstanceError):
        record.count = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "key 'count': is True, expected a whole number"),
        ({"count": 1.0}, "key 'count': is 1.0, expected a whole number"),
        ({"rate": "1"}, "key 'rate': is '1', expected a number"),
        ({"pair": [1]}, "key 'pair': has 1 values, expected 2"),
        ({"pair": [1, None]}, "key 'pair.1': is None, expected a whole number"),
        ({"inner": {"shape": [], "kind": 3, "more": 1}}, "unknown key 'inner.more'"),
        ({"inner": {"kind": "c"}}, "key 'inner.kind': is 'c', expected one of"),
        ({"rate": 1 << 1328}, "key 'rate': is an integer of 1,329 bits, expected a number"),
        ({"count": "x" * 10_000}, r"key 'count': is 'x{20,50}\.\.\.x+', expected a whole number"),
        ({"inner": {"kind": "c", "shape": []}}, "key 'inner.kind': is 'c', expected one of 'a', 'b'"),
        ({"inner": {"kind": "a"}}, "key 'inner.shape': is missing"),
        ({"named": {"x": {"kind": "a", "shape": [None]}}}, "key 'named.x.shape.0': is None, expected"),
        ({"named": []}, r"key 'named': is \[\], expected an object"),
        ({"inner": {"kind": "a", "shape": [], "size": 1}}, "unknown key 'inner.size', known: kind, shape"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        Outer.model_validate(RAW | change)


def test_unknown_keys_have_an_error_of_their_own() -> None:
    with pytest.raises(UnknownKeyError, match="unknown key 'more', known: count"):
        Outer.model_validate(RAW | {"more": 1})
    with pytest.raises(RecordError, match="expected an object"):
        Outer.model_validate([])
    with pytest.raises(RecordError, match="not valid JSON"):
        Outer.model_validate_json("{")


def test_a_key_that_was_perhaps_meant_is_named() -> None:
    with pytest.raises(UnknownKeyError, match=r"unknown key 'inner\.shap', known: kind, shape; did you mean shape\?"):
        Outer.model_validate(RAW | {"inner": {"kind": "a", "shape": [], "shap": []}})


@pytest.mark.parametrize(("literal", "value"), [(True, 1), (1, True), (1, 1.0), (0, False), (128, 128.0)])
def test_a_literal_takes_no_other_type(literal: object, value: object) -> None:
    take = converter(Literal[literal])
    assert take(literal) is literal
    with pytest.raises(RecordError, match="expected one of"):
        take(value)


class Open(OpenRecord):
    size: Annotated[int, at_least(1)]


def test_an_open_record_keeps_what_it_does_not_know() -> None:
    record = Open.model_validate({"note": [1, {"a": None}], "size": 2})
    assert record.model_dump() == {"size": 2, "note": [1, {"a": None}]} and list(Open.model_fields) == ["size"]
    changed = record.model_copy(update={"size": 3})
    assert changed.model_extra == record.model_extra and changed != record
    assert record != Open(size=2) and hash(record) == hash(Open(size=2))
    with pytest.raises(RecordError, match="key 'size': is missing"):
        Open.model_validate({"note": 1})


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (Annotated[int, at_least(1, 9)], 10, "is 10, expected at most 9"),
        pytest.param(
            Annotated[int, at_least(1)], 1 << 16_609, "is an integer of 16,610 bits, expected at most", id="huge"
        ),
        (Annotated[float, above_zero(9)], float("nan"), "is nan, expected a finite number"),
        (Annotated[float, above_zero(9)], 0, "is 0.0, expected a number above 0"),
        (Annotated[float, above_zero(9)], 9.5, "is 9.5, expected at most 9"),
        (tuple[Annotated[int, at_least(0)], ...] | None, [0, -1], "key '1': is -1, expected at least 0"),
        (Callable[[str], object] | None, 3, "is 3, expected a function"),
        (str, np.zeros((3, 3)), r"is array\(.*\), expected text"),
    ],
)
def test_an_annotation_alone_is_checked_too(hint: Any, value: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        converter(hint)(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150
