"""Stop strings and whole characters, whatever the token borders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seekforge.runtime.text import TextStream
from seekforge.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(toy_engine: Path) -> Tokenizer:
    return Tokenizer(toy_engine / "tokenizer.json")


def run(tokenizer: Tokenizer, ids: list[int], stop: list[str], **options) -> tuple[str, list[str], bool]:
    """Return the text, its pieces as a reader sees them, and whether a stop string was found."""
    stream = TextStream(tokenizer, stop, **options)
    pieces = []
    for token in ids:
        stopped = stream.push(token)
        pieces.append(stream.take())
        if stopped:
            return stream.text, pieces, True
    pieces.append(stream.take(final=True))
    return stream.text, pieces, False


@given(
    text=st.text("abé🎉x ", max_size=24),
    stop=st.lists(st.text("abé🎉x ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_text_ends_where_the_first_stop_string_begins(tokenizer: Tokenizer, text, stop, include) -> None:
    ids = [token for char in text for token in tokenizer.encode(char)]  # one character or less per token
    found, pieces, stopped = run(tokenizer, ids, stop, include_stop=include)
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    assert "".join(pieces) == found and stopped == bool(ends)
    if ends:
        end = min(ends)[0]
        first = min((start, s) for e, start, s in ends if e == end)
        assert found == text[: first[0] + len(first[1]) if include else first[0]]
    else:
        assert found == text


def test_nothing_of_a_stop_string_leaks(tokenizer: Tokenizer) -> None:
    ids = [token for char in "one STO two STOP three" for token in tokenizer.encode(char)]
    _, pieces, stopped = run(tokenizer, ids, ["STOP"])
    assert stopped and "".join(pieces) == "one STO two "
    assert pieces[5] == ""  # "S" is held back until it is no beginning of a stop string


def test_min_tokens_and_half_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a") * 6
    assert run(tokenizer, ids, ["aa"], min_tokens=4)[0] == "aa"
    assert run(tokenizer, tokenizer.encode("🎉")[:1], [])[0] in ("🎉", "\ufffd")
