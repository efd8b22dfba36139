"""A user's own chat template: Jinja, in its sandbox, with the variables that Hugging Face's templates know.

What messages say must not become a special token. A template returns one text, in which nobody could tell who wrote
what; so messages are marked before: a character that stands nowhere in them is put into each text that is, begins or
ends a special token, and taken out again when the special tokens of the result have been found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from seekforge.common.errors import EnvironmentFault, RequestError
from seekforge.common.reading import SETTINGS_BYTES, read_text
from seekforge.common.requirements import install
from seekforge.runtime.chat import markup
from seekforge.runtime.chat.messages import Message
from seekforge.runtime.text.segments import Segment, SegmentedText
from seekforge.runtime.text.tokenizer import Tokenizer

#: Code points that are no characters: one of them is the mark.
_MARKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
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
            from jinja2 import TemplateError, sandbox  # an optional dependency
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
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
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
    ) -> SegmentedText:
        """Return the prompt of a conversation.

        Raises:
            RequestError: the template refuses it, or fails.
        """
        raw = [message.to_dict() for message in messages]
        functions = [{"type": "function", "function": dict(tool)} for tool in tools]
        everything = json.dumps([raw, functions, dict(variables)], ensure_ascii=False, default=str)
        mark = next((one for one in _MARKS if one not in everything), None)
        if mark is None:
            raise RequestError("the conversation holds every code point that is no character; leave them out")
        marked = _Marker(mark, [text for text in tokenizer.added_texts.values() if text])
        try:
            text = self._template.render(
                messages=marked(raw),
                tools=marked(functions) or None,
                add_generation_prompt=add_generation_prompt,
                bos_token=markup.BOS,
                eos_token=markup.EOS,
                **{str(name): marked(value) for name, value in variables.items()},
            )
        except self._error as error:
            raise RequestError(f"chat_template: {_line(error)}") from None
        except Exception as error:  # whatever its expressions do
            raise RequestError(f"chat_template fails: {type(error).__name__}: {_line(error)}") from None
        return SegmentedText.of(
            _segments(text, mark, tokenizer), in_reasoning=text.rstrip("\n").endswith(markup.THINK_START)
        )


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


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise RequestError(message)


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
