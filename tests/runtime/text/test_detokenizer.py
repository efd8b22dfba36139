"""Stop strings and whole characters, whatever the token borders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seekforge.runtime.text.detokenizer import TextStream
from seekforge.runtime.text.tokenizer import Tokenizer


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
    assert run(tokenizer, ids, ["aa"], min_tokens=4)[0] == "aaa"
    assert run(tokenizer, tokenizer.encode("🎉")[:1], [])[0] in ("🎉", "\ufffd")


EOS = "<｜end▁of▁sentence｜>"


@given(
    pieces=st.lists(st.sampled_from(["a", "b", "ab", "é", "x ", EOS, "<think>", "🎉", "｜"]), max_size=16),
    stop=st.lists(st.sampled_from(["a", "ab", "ba", EOS, "b" + EOS, EOS + "a", "🎉", "a<think>", "é" * 2]), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 8),
    skip=st.booleans(),
)
def test_deltas_join_to_the_text_and_stops_count_after_min_tokens(
    tokenizer: Tokenizer, pieces, stop, include, min_tokens, skip
) -> None:
    """Against a plain search of the text so far, token by token, special tokens written out and not."""
    ids = [token for piece in pieces for token in tokenizer.encode(piece)]
    options = {"include_stop": include, "min_tokens": min_tokens, "skip_special_tokens": skip}
    found, deltas, stopped = run(tokenizer, ids, stop, **options)
    assert "".join(deltas) == found
    before = (0, 0)
    for count in range(1, len(ids) + 1):
        texts = [
            tokenizer.decode(ids[:count], skip_special_tokens=skipped).rstrip("\ufffd") for skipped in (skip, False)
        ]
        ends = [
            any(text.find(one, max(start - len(one) + 1, 0)) >= 0 for one in stop)
            for text, start in zip(texts, before, strict=True)
        ]
        before = (len(texts[0]), len(texts[1]))
        if any(ends) and count > min_tokens:
            break
    else:
        assert not stopped and found == tokenizer.decode(ids, skip_special_tokens=skip)
        return
    assert stopped
    whole = tokenizer.decode(ids[:count], skip_special_tokens=skip)
    if include:
        assert any(found.endswith(one) for one in stop)
    else:
        assert whole.startswith(found)


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["a", EOS, "b"], [EOS], "a"),
        (["a", EOS, "b"], ["a" + EOS], ""),
        (["x ", EOS, "a", "b"], [EOS + "ab"], "x "),
        (["x ", EOS, "a", "b"], ["ab"], "x "),
        (["a", EOS, "b"], ["ab"], ""),
    ],
)
def test_a_stop_string_may_hold_a_special_token(tokenizer: Tokenizer, pieces, stop, text) -> None:
    ids = [token for piece in pieces for token in tokenizer.encode(piece)]
    found, deltas, stopped = run(tokenizer, ids, stop)
    assert stopped and found == text == "".join(deltas)


def test_what_ends_the_request_is_left_out_or_shown(tokenizer: Tokenizer) -> None:
    think, end = tokenizer.encode("<think>" + EOS)
    for include, skip, text in ((False, False, "a"), (True, False, "a" + EOS), (True, True, "a"), (False, True, "a")):
        stream = TextStream(tokenizer, include_stop=include, skip_special_tokens=skip, stop_ids=[end])
        for token in [*tokenizer.encode("a"), end]:
            stream.push(token)
        assert stream.take(final=True) == stream.text == text
    stream = TextStream(tokenizer, stop_ids=[think])
    stream.push(think)
    assert stream.take(final=True) == ""


def test_a_stop_string_of_many_letters_is_searched_in_linear_time(tokenizer: Tokenizer) -> None:
    """A hundred thousand letters, each of which could begin it: squared, this would not end."""
    letter = tokenizer.encode("a")
    stream = TextStream(tokenizer, ["a" * 50_000 + "b"])
    for _ in range(100_000):
        stream.push(letter[0])
        stream.take()
    assert len(stream.take(final=True)) == 50_000
