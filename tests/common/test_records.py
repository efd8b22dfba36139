"""Records take what fits their annotations and name what does not."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, field
from typing import Any, Literal

import numpy as np
import pytest

from seekforge.common.records import Record, RecordError, UnknownKeyError


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
        ({"inner": {"kind": "c", "shape": []}}, "key 'inner.kind': is 'c', expected one of 'a', 'b'"),
        ({"inner": {"kind": "a"}}, "key 'inner.shape': is missing"),
        ({"named": {"x": {"kind": "a", "shape": [None]}}}, "key 'named.x.shape.0': is None, expected"),
        ({"named": []}, r"key 'named': is \[\], expected an object"),
        ({"inner": {"kind": "a", "shape": [], "size": 1}}, "key 'inner.size': unknown, known: kind, shape"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        Outer.model_validate(RAW | change)


def test_unknown_keys_have_an_error_of_their_own() -> None:
    with pytest.raises(UnknownKeyError, match="key 'more': unknown"):
        Outer.model_validate(RAW | {"more": 1})
    with pytest.raises(RecordError, match="expected an object"):
        Outer.model_validate([])
    with pytest.raises(RecordError, match="not valid JSON"):
        Outer.model_validate_json("{")
