"""From a model's text, in pieces of any size, to spans of known kinds. Nothing is lost and nothing is invented.

A state machine: what it holds back is at most the beginning of a tag, so a text takes time in proportion to its
length, however it is cut. Joined, the spans are the text; where pieces were cut changes where spans are cut, and
nothing else.

Tags are taken as the model was trained to write them (spec §8.2, §8.4), and where they are not all there as far as
their meaning is certain: a call may stand without the block around it, and a tag that opens ends what should have been
closed. All else is content.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from seekforge.runtime.chat import markup
from seekforge.runtime.chat.held_text import SPACE, HeldText, begun

#: "markup": tags and the white space around them. "call", "parameter", "body": what such a tag opens, see `Span`.
Kind = Literal["reasoning", "content", "markup", "call", "parameter", "value", "end_parameter", "body", "end_call"]
_State = Literal["reasoning", "content", "block", "call", "value", "body"]

#: Longest tag that is waited for.
MAX_TAG: Final = 1024
_TOO_LONG: Final = -1
_TAG: Final = re.compile(r'<(?:[^">]|"[^"]*")*>')
_ATTRIBUTE: Final = re.compile(r'\s+(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Span:
    """A piece of the text.

    Attributes:
        kind: "reasoning", "content", "value" (of a parameter) and "body" (the JSON of a call without parameters) are
            text; the others are tags: "call" opens a call, "parameter" a parameter, "end_parameter" and "end_call" end
            them, and "markup" is everything else.
        text: as the model wrote it; empty where a tag is missing and its meaning is certain.
        name: the name of a call or parameter.
        call_id: the id that the model gave the call it opens; "": none.
        string: what a parameter says of its value: "true", "false", "either" (text where it is no JSON) or None.
        problem: what is not as it should be.
    """

    kind: Kind
    text: str
    name: str = ""
    string: str | None = None
    problem: str | None = None
    call_id: str = ""


class Scanner(HeldText):
    """Splits one completion."""

    def __init__(self, *, in_reasoning: bool, tool_calls: bool = True) -> None:
        """Start at the beginning of a completion.

        Args:
            in_reasoning: whether it begins inside a thought.
            tool_calls: whether tags about tools are looked for; else they are content.
        """
        super().__init__()
        self._state: _State = "reasoning" if in_reasoning else "content"
        self._tool_calls = tool_calls
        self._in_block = False
        self._junk = False  # whether text stands between tags, which is content up to the next tag
        self._has_parameters = False

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is thought."""
        return self._state == "reasoning"

    def finish(self) -> Iterator[Span]:
        """Yield what is left, since nothing follows: the beginning of a tag is no tag."""
        self._final = True
        yield from self._scan()
        rest, self._held = self._held, ""
        if not rest:
            return
        match self._state:
            case "block" | "call" if not self._junk:
                yield Span("markup", rest, problem="the text ends inside a tag")
            case "block" | "call" | "content":
                yield Span("content", rest)
            case "reasoning" | "value" | "body" as kind:
                yield Span(kind, rest)

    def _scan(self) -> Iterator[Span]:
        steps = {
            "reasoning": self._reasoning,
            "content": self._content,
            "block": self._between_tags,
            "call": self._between_tags,
            "value": self._value,
            "body": self._body,
        }
        while self._held:
            before = self._state, len(self._held)
            yield from steps[self._state]()
            if (self._state, len(self._held)) == before:
                return

    def _until(self, kind: Kind, tag: str) -> Iterator[Span]:
        """Yield the text before a tag as `kind`, as far as it is certain; the tag stands first then."""
        at = self._held.find(tag)
        waited = begun(self._held, tag) if at < 0 and "<" in self._held else 0
        text = self._take(at if at >= 0 else len(self._held) - waited)
        if text:
            yield Span(kind, text)

    def _reasoning(self) -> Iterator[Span]:
        yield from self._until("reasoning", markup.THINK_END)
        if self._held.startswith(markup.THINK_END):
            yield Span("markup", self._take(len(markup.THINK_END)))
            self._state = "content"

    def _content(self) -> Iterator[Span]:
        if "<" not in self._held and not self._held.endswith("\n"):  # most of a text: no tag is begun
            yield Span("content", self._take(len(self._held)))
            return
        tags = (markup.CALLS_START, markup.INVOKE_START) if self._tool_calls else ()
        places = [at for at in (self._held.find(tag) for tag in (*tags, markup.EOS)) if at >= 0]
        if not places:
            texts = [*tags, *(markup.CALLS_GAP + tag for tag in tags), markup.EOS]
            text = self._take(len(self._held) - max(begun(self._held, tag) for tag in texts))
            if text:
                yield Span("content", text)
            return
        at = min(places)
        if self._held.startswith(markup.EOS, at):
            if at:
                yield Span("content", self._take(at))
            yield Span("markup", self._take(len(markup.EOS)))
            return
        is_block = self._held.startswith(markup.CALLS_START, at)
        if not is_block and self._tag_end(at) is None and not self._final:  # its end decides whether it is a tag
            return
        gap = self._held.endswith(markup.CALLS_GAP, 0, at)
        if not is_block and self._call_at(at) is None:
            yield Span("content", self._take(at + len(markup.INVOKE_START)))
            return
        text = self._take(at - len(markup.CALLS_GAP) * gap)
        if text:
            yield Span("content", text)
        before = self._take(len(markup.CALLS_GAP) * gap)
        self._state, self._in_block, self._junk = "block", is_block, False
        if is_block:
            yield Span("markup", before + self._take(len(markup.CALLS_START)))
        elif before:
            yield Span("markup", before)

    def _between_tags(self) -> Iterator[Span]:
        """Take one tag, the space before it, or text that should not be there."""
        if not self._junk:
            space = len(self._held) - len(self._held.lstrip(SPACE))
            if space:
                yield Span("markup", self._take(space))
                return
        if self._held.startswith("<"):
            if (yield from self._tag()):
                self._junk = False
                return
            if any(tag.startswith(self._held) for tag in self._tags()):
                return  # the beginning of a tag
            if self._held.startswith(self._tags()) and self._tag_end(0) is None:
                return
        elif self._state == "call" and self._held.startswith("{") and not self._junk and not self._has_parameters:
            self._state = "body"
            return
        if not self._in_block and self._state == "block":  # calls without a block around them have ended
            self._state = "content"
            return
        self._junk = True
        at = self._held.find("<", 1)
        yield Span("content", self._take(at if at > 0 else len(self._held)))

    def _tags(self) -> tuple[str, ...]:
        inside = (markup.PARAMETER_START, markup.INVOKE_END) if self._state == "call" else ()
        return (*inside, markup.INVOKE_START, markup.CALLS_START, markup.CALLS_END)

    def _tag(self) -> Generator[Span, None, bool]:
        """Yield the tag that stands first; returns whether there is one."""
        in_call = self._state == "call"
        if in_call and self._held.startswith(markup.INVOKE_END):
            self._state = "block"
            yield Span("end_call", self._take(len(markup.INVOKE_END)))
            return True
        states: tuple[tuple[str, _State], ...] = ((markup.CALLS_END, "content"), (markup.CALLS_START, "block"))
        for tag, state in states:
            if self._held.startswith(tag):
                if in_call:
                    yield Span("end_call", "", problem=f"it is not ended by {markup.INVOKE_END}")
                self._state, self._in_block = state, state == "block"
                yield Span("markup", self._take(len(tag)))
                return True
        call = self._call_at(0)
        if call is not None:
            name, end = call
            if in_call:
                yield Span("end_call", "", problem=f"it is not ended by {markup.INVOKE_END}")
            self._state, self._has_parameters = "call", False
            yield Span("call", self._take(end), name)
            return True
        if in_call and self._held.startswith(markup.PARAMETER_START):
            end = self._tag_end(0)
            if end is None or end == _TOO_LONG:
                return False
            attributes = _attributes(self._held[len(markup.PARAMETER_START) : end - 1])
            if "name" in attributes:
                self._state, self._has_parameters = "value", True
                yield Span("parameter", self._take(end), attributes["name"], attributes.get("string"))
                return True
        return False

    def _call_at(self, at: int) -> tuple[str, int] | None:
        """Return the name of the call whose tag stands at `at`, and where the tag ends; None: there is none."""
        if not self._held.startswith(markup.INVOKE_START, at):
            return None
        end = self._tag_end(at)
        if end is None or end == _TOO_LONG:
            return None
        attributes = _attributes(self._held[at + len(markup.INVOKE_START) : end - 1])
        return (attributes["name"], end) if attributes.get("name") else None

    def _tag_end(self, at: int) -> int | None:
        """Return where the tag that begins at `at` ends; None: not yet; `_TOO_LONG`: it is none."""
        match = _TAG.match(self._held, at, at + MAX_TAG)
        if match is not None:
            return match.end()
        return _TOO_LONG if len(self._held) >= at + MAX_TAG else None

    def _value(self) -> Iterator[Span]:
        yield from self._until("value", markup.PARAMETER_END)
        if self._held.startswith(markup.PARAMETER_END):
            self._state = "call"
            yield Span("end_parameter", self._take(len(markup.PARAMETER_END)))

    def _body(self) -> Iterator[Span]:
        yield from self._until("body", markup.INVOKE_END)
        if self._held.startswith(markup.INVOKE_END):
            self._state = "block"
            yield Span("end_call", self._take(len(markup.INVOKE_END)))


def _attributes(text: str) -> dict[str, str]:
    """Return the attributes of a tag; none if something else stands there."""
    attributes: dict[str, str] = {}
    at = 0
    while (match := _ATTRIBUTE.match(text, at)) is not None:
        attributes[match[1]] = match[2]
        at = match.end()
    return {} if text[at:].strip() else attributes
