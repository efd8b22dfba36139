"""A chat template, a user's own or that of a checkpoint: Jinja, in its sandbox, with the variables that Hugging Face's
templates know. It is a file from elsewhere: the lines that it may run are counted, and what each may make is bounded
(`sandbox`).

What messages say must not become a special token. A template returns one text, in which nobody could tell who wrote
what; so messages are marked before: a character that stands nowhere in them is put into each text that is, begins or
ends a special token, and taken out again when the special tokens of the result have been found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

from seekforge.common.errors import EngineError, EnvironmentFault, RequestError
from seekforge.common.reading import LISTING_BYTES, SETTINGS_BYTES, is_there, read_json, read_text
from seekforge.common.requirements import install
from seekforge.formats.program import TEMPLATE_FILE
from seekforge.runtime.chat import markup
from seekforge.runtime.chat.messages import Message
from seekforge.runtime.chat.sandbox import bounded_environment
from seekforge.runtime.text.segments import Segment, SegmentedText
from seekforge.runtime.text.tokenizer import Tokenizer

#: Code points that are no characters: one of them is the mark.
_MARKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
#: Lines of a template that may run: a hundred for each of some thousand messages.
_MOST_LINES: Final = 1_000_000
#: Keys whose values a template compares and that no text comes from.
_KEPT: Final = frozenset(("role", "type"))


class ChatTemplate:
    """One template, compiled."""

    def __init__(self, source: str | Path) -> None:
        """Compile it.

        Args:
            source: the template, or a file of it.

        Raises:
            RequestError: it cannot be read, or is no template.
            EnvironmentFault: jinja2 is not installed.
        """
        try:
            from jinja2 import TemplateError  # an optional dependency
        except ModuleNotFoundError:
            raise EnvironmentFault(
                f"a chat template needs the module 'jinja2', which is not installed; {install('templates')}"
            ) from None
        if isinstance(source, Path):
            try:
                text = read_text(source, most=SETTINGS_BYTES)
            except (OSError, ValueError) as error:
                raise RequestError(f"chat_template {source}: cannot be read ({error})") from None
        else:
            text = source
        environment = bounded_environment()
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._error = TemplateError
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise RequestError(f"chat_template is no Jinja template: {_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        parses_arguments: bool = False,
    ) -> SegmentedText:
        """Return the prompt of a conversation.

        Args:
            messages: the conversation.
            tokenizer: what knows the special tokens.
            tools: functions.
            add_generation_prompt: whether the answer is begun.
            variables: further names.
            parses_arguments: whether the template reads arguments of calls as an object and not as text.

        Raises:
            RequestError: the template refuses it, or fails.
        """
        raw = [_written(message, parsed=parses_arguments) for message in messages]
        functions = [{"type": "function", "function": dict(tool)} for tool in tools]
        everything = json.dumps([raw, functions, dict(variables)], ensure_ascii=False, default=str)
        mark = next((one for one in _MARKS if one not in everything), None)
        if mark is None:
            raise RequestError("the conversation holds every code point that is no character; leave them out")
        marked = _Marker(mark, [text for text in tokenizer.added_texts.values() if text])
        try:
            with _bounded():
                text = self._template.render(
                    messages=marked(raw),
                    tools=marked(functions) or None,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=markup.BOS,
                    eos_token=markup.EOS,
                    **{str(name): marked(value) for name, value in variables.items()},
                )
        except RequestError:
            raise
        except self._error as error:
            raise RequestError(f"chat_template: {_line(error)}") from None
        except Exception as error:  # whatever its expressions do
            raise RequestError(f"chat_template fails: {type(error).__name__}: {_line(error)}") from None
        return SegmentedText.of(
            _segments(text, mark, tokenizer), in_reasoning=text.rstrip("\n").endswith(markup.THINK_START)
        )


def _written(message: Message, *, parsed: bool) -> dict[str, Any]:
    raw = message.to_dict()
    for call in raw.get("tool_calls", ()) if parsed else ():
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return raw


@contextmanager
def _bounded() -> Iterator[None]:
    """Count the lines of a template that run, and end it beyond a bound; those of filters do not count."""
    left, before = _MOST_LINES, sys.gettrace()

    def lines(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise RequestError(f"chat_template runs more than {_MOST_LINES:,} steps")
        return lines

    sys.settrace(lambda frame, event, argument: lines if frame.f_code.co_filename == "<template>" else None)
    try:
        yield
    finally:
        sys.settrace(before)


def checkpoint_template(folder: Path) -> str | None:
    """Return the chat template that an engine carries from its checkpoint, or None.

    Raises:
        EngineError: a file that should hold it cannot be read.
    """
    path = folder / TEMPLATE_FILE
    try:
        if is_there(path):
            return read_text(path, most=SETTINGS_BYTES)
        path = folder / "tokenizer_config.json"
        raw = read_json(path, most=LISTING_BYTES) if is_there(path) else None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); build the engine again") from None
    template = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(template, list):  # several, by their names
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) and len(template) <= SETTINGS_BYTES else None


class _Marker:
    """Marks the texts of values."""

    def __init__(self, mark: str, tokens: Sequence[str]) -> None:
        self._mark, self._tokens = mark, tokens

    def __call__(self, value: Any) -> Any:
        """Return a value whose texts cannot be, begin or end a special token."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self(key): one if key in _KEPT else self(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(one) for one in value]
        return value

    def _text(self, text: str) -> str:
        for token in self._tokens:
            text = text.replace(token, token[0] + self._mark + token[1:])
        before = any(text[:size] in token[-size:] for token in self._tokens for size in _sizes(text, token, -1))
        after = any(text[-size:] == token[:size] for token in self._tokens for size in _sizes(text, token, 0))
        inside = any(text in token for token in self._tokens) if text else False
        return self._mark * (before or inside) + text + self._mark * (after or inside)


def _sizes(text: str, token: str, side: int) -> range:
    """Return how many characters of a text could be one end of a token: none in most cases, which is seen at once."""
    if not text or (text[-1] not in token if side == 0 else text[0] not in token):
        return range(0)
    return range(1, min(len(text), len(token) - 1) + 1)


def _segments(text: str, mark: str, tokenizer: Tokenizer) -> list[Segment]:
    pattern = tokenizer.added_pattern
    segments: list[Segment] = []
    at = 0
    for match in pattern.finditer(text) if pattern is not None else ():
        segments += [Segment(text[at : match.start()].replace(mark, "")), Segment(match[0], True)]
        at = match.end()
    return [*segments, Segment(text[at:].replace(mark, ""))]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def template_reader() -> Callable[[str | Path], ChatTemplate]:
    """Return what compiles templates, and keeps the last one."""
    kept: dict[str | Path, ChatTemplate] = {}

    def read(source: str | Path) -> ChatTemplate:
        if isinstance(source, Path) or source not in kept:
            template = ChatTemplate(source)
            kept.clear()
            kept[source] = template
        return kept[source]

    return read
