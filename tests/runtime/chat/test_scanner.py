"""A completion in spans: no byte lost or invented, and the same however it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seekforge.runtime.chat import ChatParser, Scanner, Span
from seekforge.runtime.chat.scanner import MAX_TAG

CALL = '<｜DSML｜invoke name="f">\n'
PARAMETER = '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>\n'
#: What texts are made of: tags whole, half and wrong, and what stands between them.
PARTS = [
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    CALL,
    '<｜DSML｜invoke name="">',
    '<｜DSML｜invoke nam="f">',
    "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="a" string="true">',
    '<｜DSML｜parameter string="false" name="b">',
    '<｜DSML｜parameter name="c">',
    '<｜DSML｜parameter name="d',
    "</｜DSML｜parameter>",
    "</think>",
    "<think>",
    "<｜end▁of▁sentence｜>",
    "<｜DSML｜",
    "<｜",
    "</",
    "\n",
    "\n\n",
    " ",
    "x",
    "<",
    ">",
    '"',
    '{"a": 1}',
    "7",
    "日🎉",
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=25).map("".join)


def spans(pieces: Iterable[str], in_reasoning: bool) -> list[Span]:
    scanner = Scanner(in_reasoning=in_reasoning)
    return [span for piece in pieces for span in scanner.push(piece)] + list(scanner.finish())


def joined(several: list[Span]) -> list[Span]:
    """Spans of one kind of text that follow each other are one."""
    out: list[Span] = []
    for span in several:
        plain = span.kind in ("reasoning", "content", "markup", "value", "body") and span.problem is None
        if plain and out and out[-1].kind == span.kind and out[-1].problem is None:
            out[-1] = Span(span.kind, out[-1].text + span.text)
        else:
            out.append(span)
    return out


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS, st.lists(st.integers(0, 200)), st.booleans())
def test_spans_are_the_text_and_cuts_change_nothing(text: str, cuts: list[int], in_reasoning: bool) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(places)]
    whole, cut, single = (spans(one, in_reasoning) for one in ([text], pieces, text))
    assert "".join(span.text for span in whole) == text
    assert joined(whole) == joined(cut) == joined(single)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS, st.lists(st.integers(0, 200)), st.booleans())
def test_deltas_are_the_message_however_the_text_is_cut(text: str, cuts: list[int], in_reasoning: bool) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    messages = []
    for pieces in ([text], [text[start:stop] for start, stop in itertools.pairwise(places)], text):
        parser = ChatParser(in_reasoning=in_reasoning, make_id=lambda: "id")
        deltas = [delta for piece in pieces for delta in parser.push(piece)] + list(parser.finish())
        message = parser.message
        messages.append(message)
        assert all(deltas)
        assert "".join(delta.content for delta in deltas) == message.content
        assert "".join(delta.reasoning_content for delta in deltas) == (message.reasoning_content or "")
        arguments = [""] * len(message.tool_calls)
        for delta in (call for one in deltas for call in one.tool_calls):
            arguments[delta.index] += delta.arguments
        assert arguments == [call.arguments for call in message.tool_calls]
    assert messages[0] == messages[1] == messages[2]


def test_text_without_tags_is_given_out_at_once() -> None:
    scanner = Scanner(in_reasoning=False)
    assert [span.text for span in scanner.push("Hello, wor")] == ["Hello, wor"]
    assert [span.text for span in scanner.push("a < b\n")] == ["a < b"]
    assert [span.text for span in scanner.push("c")] == ["\nc"]


def test_without_tools_their_tags_are_content() -> None:
    scanner = Scanner(in_reasoning=False, tool_calls=False)
    text = f"\n\n<｜DSML｜function_calls>\n{CALL}"
    assert {span.kind for span in [*scanner.push(text), *scanner.finish()]} == {"content"}


@pytest.mark.parametrize(
    "text",
    [
        "x" * 9_000,
        "<" * 3_000,
        "\n" * 3_000,
        "<｜DSML｜" * 900,
        CALL * 400,
        (CALL + PARAMETER) * 90,
        f"{CALL[:-3]}{'y' * 9_000}",
    ],
)
@pytest.mark.parametrize("in_reasoning", [False, True])
def test_what_is_held_back_is_at_most_a_tag(text: str, in_reasoning: bool) -> None:
    """So a step looks at no more than that, and a text takes time in proportion to its length."""
    scanner = Scanner(in_reasoning=in_reasoning)
    for char in text:
        for _ in scanner.push(char):
            pass
        assert len(scanner._held) <= MAX_TAG + 2
