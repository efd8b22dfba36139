"""One id or several: what is read, and what is written again."""

from __future__ import annotations

import pytest

from seekforge.formats.end_of_sequence import as_written, end_ids


@pytest.mark.parametrize(("value", "ids"), [(1, (1,)), (0, (0,)), ([5], (5,)), ((7, 1), (7, 1))])
def test_one_id_is_a_list_of_one(value: int | list[int] | tuple[int, ...], ids: tuple[int, ...]) -> None:
    assert end_ids(value) == ids


@pytest.mark.parametrize(("ids", "value"), [((1,), 1), ([5], 5), ((7, 1), (7, 1))])
def test_one_alone_is_written_bare(ids: tuple[int, ...] | list[int], value: object) -> None:
    assert as_written(ids) == value
