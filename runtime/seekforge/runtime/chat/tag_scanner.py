"""Completions of GLM-5, DeepSeek-V3 and Kimi-K2 as spans: families whose calls are told apart by tags of fixed text.

The same promises as `scanner`: joined, the spans are the text, and what is held back is at most the beginning of a
tag, white space before one, or the name of a call or argument. What has no whole name is no call, and is content.

GLM: `<tool_call>NAME`, then `<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>` for each argument, `</tool_call>`;
white space may stand between all of these. DeepSeek-V3.1:
`<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>`, with tags around all calls; V3 and R1 write
`function` in place of the name, and name and fenced JSON behind it. Kimi-K2, whose config is DeepSeek-V3's:
`<|tool_call_begin|>functions.NAME:NUMBER<|tool_call_argument_begin|>JSON<|tool_call_end|>`; what stands before the JSON
is the call's id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from seekforge.runtime.chat import markup
from seekforge.runtime.chat.held_text import SPACE, HeldText, begun
from seekforge.runtime.chat.scanner import Kind, Span

TagSyntax = Literal["glm", "deepseek_v3", "kimi"]

_CALL: Final = "<tool_call>"
_CALL_END: Final = "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


@dataclass(frozen=True)
class _JsonCalls:
    """Tags of a family whose arguments are JSON: around all calls, around each, and before its arguments."""

    block: str
    block_end: str
    begin: str
    separator: str
    end: str

    @property
    def tags(self) -> tuple[str, ...]:
        return self.block, self.block_end, self.begin, self.separator, self.end


_DEEPSEEK: Final = _JsonCalls(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)
_KIMI: Final = _JsonCalls(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
#: A token that only vocabularies of Kimi-K2 have, whose `model_type` is DeepSeek-V3's.
KIMI_TOKEN: Final = _KIMI.begin
#: An id as Kimi-K2 writes it, and the name in it.
_KIMI_ID: Final = re.compile(r"(?:functions\.)?(\S+):\d+")
_FENCE, _FENCE_END = "```json\n", "\n```"
#: What ends a turn and may come as text.
_ENDS: Final[dict[TagSyntax, tuple[str, ...]]] = {
    "glm": ("<|user|>", "<|observation|>", "<|endoftext|>"),
    "deepseek_v3": (markup.EOS,),
    "kimi": ("<|im_end|>", "[EOS]"),
}
#: Tags that a tokenizer may have as special tokens, which text must then show.
TAGS: Final[dict[TagSyntax, tuple[str, ...]]] = {
    "glm": (markup.THINK_START, markup.THINK_END, _CALL, _CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END),
    "deepseek_v3": (markup.THINK_START, markup.THINK_END, *_DEEPSEEK.tags),
    "kimi": (markup.THINK_START, markup.THINK_END, *_KIMI.tags),
}
#: Longest name of a call or argument, and longest white space before a tag that is not content.
_MAX_NAME: Final = 1024


class TagScanner(HeldText):
    """Splits one completion."""

    def __init__(self, syntax: TagSyntax, *, in_reasoning: bool, tool_calls: bool = True) -> None:
        """Start at the beginning of a completion.

        Args:
            syntax: whose tags they are.
            in_reasoning: whether it begins inside a thought; if not, a thought may be the first thing in it.
            tool_calls: whether tags about tools are looked for; else they are content.
        """
        super().__init__()
        self._syntax: TagSyntax = syntax
        self._json = _KIMI if syntax == "kimi" else _DEEPSEEK
        self._tool_calls = tool_calls
        self._named = ""  # the tag that opened a call or argument, and what there is of its name
        self._words_between = False  # whether something else than space came where only tags should
        self._state: Callable[[], Iterator[Span]] = self._reasoning if in_reasoning else self._start

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is thought."""
        return self._state == self._reasoning

    def finish(self) -> Iterator[Span]:
        """Yield what is left, since nothing follows: the beginning of a tag is no tag."""
        self._final = True
        yield from self._scan()
        rest, self._held, self._named = self._named + self._held, "", ""
        if rest:
            yield Span("markup" if self._state == self._argument_name else "content", rest)

    def _scan(self) -> Iterator[Span]:
        while True:
            before = self._state, len(self._held)
            yield from self._state()
            if (self._state, len(self._held)) == before:
                return

    def _split(self, tags: Sequence[str]) -> tuple[str, str]:
        """Take the text before the first of some tags, as far as it is certain, and the tag ("": none is there yet)."""
        places = [(at, -len(tag), tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if places:
            at, _, tag = min(places)
            longer = [one for one in tags if len(one) > len(tag) and one.startswith(self._held[at:])]
            if longer and not self._final:  # the next characters decide
                return self._take(at), ""
            text = self._take(at)
            self._take(len(tag))
            return text, tag
        waited = 0 if self._final else max(begun(self._held, tag) for tag in tags)
        return self._take(len(self._held) - waited), ""

    def _text(self, kind: Kind, tags: Sequence[str]) -> Iterator[Span]:
        """Yield text before a tag; the tag is left in `_named`."""
        text, self._named = self._split(tags)
        if text:
            yield Span(kind, text)

    def _between_tags(self, tags: Sequence[str]) -> Iterator[Span]:
        """Yield what stands where tags should: space is markup, unless words came before it; the tag is in `_named`."""
        text, self._named = self._split(tags)
        if not self._words_between:
            words = text.lstrip(SPACE)
            if len(words) < len(text):
                yield Span("markup", text[: len(text) - len(words)])
            text = words
        if text:
            ends_in_tag = self._final and not self._named and any(one.startswith(text) for one in tags)
            yield Span("markup" if ends_in_tag else "content", text)
        self._words_between = not self._named and (self._words_between or bool(text))

    # --- states ----------------------------------------------------------------------------------------------

    def _start(self) -> Iterator[Span]:
        opened = self._held.lstrip(SPACE)
        if len(self._held) - len(opened) > _MAX_NAME:
            self._state = self._content
        elif opened.startswith(markup.THINK_START):
            yield Span("markup", self._take(len(self._held) - len(opened) + len(markup.THINK_START)))
            self._state = self._reasoning
        elif not markup.THINK_START.startswith(opened) or self._final:
            self._state = self._content

    def _reasoning(self) -> Iterator[Span]:
        gap = f"{markup.THINK_END}\n" if self._syntax == "glm" else markup.THINK_END
        yield from self._text("reasoning", (gap, markup.THINK_END))
        if self._named:
            yield Span("markup", self._named)
            self._named, self._state = "", self._content

    def _content(self) -> Iterator[Span]:
        calls = (f"\n{_CALL}", _CALL) if self._syntax == "glm" else (self._json.block, self._json.begin)
        yield from self._text("content", (*(calls if self._tool_calls else ()), *_ENDS[self._syntax]))
        if self._named.endswith((_CALL, self._json.begin)):
            self._state = self._call_name
        elif self._named:
            if self._named == self._json.block:
                self._state = self._block
            yield Span("markup", self._named)
            self._named = ""

    def _block(self) -> Iterator[Span]:
        """Between calls whose arguments are JSON."""
        yield from self._between_tags((self._json.begin, self._json.block_end))
        if self._named == self._json.begin:
            self._state = self._call_name
        elif self._named:
            yield Span("markup", self._named)
            self._named, self._state = "", self._content

    def _call_name(self) -> Iterator[Span]:
        is_glm = self._syntax == "glm"
        separator, end = self._json.separator, self._json.end
        ends = (_KEY, _CALL_END) if is_glm else (separator, end)
        opening = next(tag for tag in (f"\n{_CALL}", _CALL, self._json.begin) if self._named.startswith(tag))
        text, tag = self._split(ends)
        self._named += text
        name = self._named.removeprefix(opening)
        if not tag and len(name) <= _MAX_NAME:
            return
        if not name.strip() or len(name) > _MAX_NAME or tag == end:  # no call begins so
            yield Span("content", self._named + tag)
            self._named, self._state = "", self._content
            return
        if tag == separator and name.strip() == "function" and self._syntax == "deepseek_v3":
            self._named, self._state = self._named + tag, self._fenced_name
            return
        name, call_id = name.strip(), ""
        if self._syntax == "kimi" and (numbered := _KIMI_ID.fullmatch(name)):
            name, call_id = numbered[1], name
        yield Span("call", self._named + (tag if tag == separator else ""), name, call_id=call_id)
        self._named = ""
        if tag == separator:
            self._state = self._body
        else:
            self._held, self._state = tag + self._held, self._arguments

    def _fenced_name(self) -> Iterator[Span]:
        """The name behind `function`, as V3 and R1 write it, up to the fence."""
        opening = self._named[: self._named.index(self._json.separator) + len(self._json.separator)]
        text, tag = self._split((_FENCE, self._json.end))
        self._named += text
        name = self._named.removeprefix(opening)
        if not tag and len(name) <= _MAX_NAME:
            return
        if tag != _FENCE or not name.strip() or len(name) > _MAX_NAME:
            yield Span("content", self._named + tag)
            self._named, self._state = "", self._content
            return
        yield Span("call", self._named + tag, name.strip())
        self._named, self._state = "", self._body

    def _body(self) -> Iterator[Span]:
        end = self._json.end
        yield from self._text("body", (f"{_FENCE_END}{end}", end))
        if self._named:
            yield Span("end_call", self._named)
            self._named, self._state = "", self._block

    def _arguments(self) -> Iterator[Span]:
        """Between the arguments of GLM."""
        yield from self._between_tags((_KEY, _CALL_END, _CALL))
        if self._named == _KEY:
            self._state = self._argument_name
        elif self._named == _CALL_END:
            yield Span("end_call", self._named)
            self._named, self._state = "", self._between_calls
        elif self._named:
            yield Span("end_call", "", problem=f"it is not ended by {_CALL_END}")
            self._state = self._call_name

    def _argument_name(self) -> Iterator[Span]:
        text, tag = self._split((_VALUE, _CALL_END))
        self._named += text
        name = self._named.removeprefix(_KEY)
        if not tag and len(name) <= _MAX_NAME:
            return
        name, ended, _ = name.partition(_KEY_END)
        if tag != _VALUE or not ended:
            yield Span("markup", self._named, problem="an argument has a key and no value")
            self._named, self._state, self._held = "", self._arguments, tag + self._held
            return
        yield Span("parameter", self._named + tag, name.strip(), string="either")
        self._named, self._state = "", self._argument

    def _argument(self) -> Iterator[Span]:
        yield from self._text("value", (_VALUE_END,))
        if self._named:
            yield Span("end_parameter", self._named)
            self._named, self._state = "", self._arguments

    def _between_calls(self) -> Iterator[Span]:
        """Behind a call of GLM: space is markup where another call follows, or nothing."""
        rest = self._held.lstrip(SPACE)
        is_long = len(self._held) - len(rest) > _MAX_NAME
        if not is_long and not self._final and rest != _CALL and _CALL.startswith(rest):
            return
        if not is_long and (not rest or rest.startswith(_CALL)):
            space = self._take(len(self._held) - len(rest))
            if space:
                yield Span("markup", space)
        self._state = self._content
