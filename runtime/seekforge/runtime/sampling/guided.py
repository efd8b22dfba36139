"""Guided decoding: which tokens keep the text within a form. Choices by `choices`, all else by llguidance (the extra
`guided`).

The library reads a tokenizer.json by its own rules: every added token that looks like a tag stands for no text, yet is
allowed where its text is. So it is told instead what each token is worth here: a token that appears in the text is
its text, one that does not (special tokens) is reached only by its name in a Lark grammar.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from seekforge.common.errors import EnvironmentFault, RequestError
from seekforge.common.requirements import install
from seekforge.runtime.sampling.choices import ChoiceMatcher, Choices
from seekforge.runtime.sampling.grammar_compiler import CompiledGrammar, trial
from seekforge.runtime.sampling.params import StructuredOutputsParams
from seekforge.runtime.sequence import Grammar
from seekforge.runtime.text.tokenizer import Tokenizer
from seekforge.runtime.text.vocabulary import Vocabulary

#: How many sets of choices, and how many grammars, are kept ready.
_KEPT = 32
#: Most bytes of a schema, an expression or a grammar.
_MAX_BYTES: Final = 256 << 10
#: Keywords of JSON Schema (2020-12, and `definitions` and `dependencies` of before) that hold schemas by name, and
#: those that hold one or a list.
_NAMED_SCHEMAS: Final = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
_SCHEMAS: Final = frozenset(
    (
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "items",
        "prefixItems",
        "additionalItems",
        "unevaluatedItems",
        "contains",
        "not",
        "if",
        "then",
        "else",
        "allOf",
        "anyOf",
        "oneOf",
        "contentSchema",
    )
)
#: Processor time in seconds that the masks of a text may take: at all, and more for each of its tokens. Others wait.
_MASK_SECONDS: Final = 0.5
_MASK_SECONDS_PER_TOKEN: Final = 0.1
#: Of a Lark grammar: what is no name of a token: texts, regular expressions, comments.
_LARK_LITERALS = r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*'


class Matcher:
    """The state of one text in its grammar."""

    def __init__(self, compiled: CompiledGrammar, vocab_size: int, ends: Sequence[int]) -> None:
        """Begin a text."""
        self._compiled, self._root = compiled, compiled.root()
        self._matcher = self._root.deep_copy()
        self._vocab_size = vocab_size
        self._end, self._ends = ends[0], list(ends)
        self._tokens: list[int] = []
        self._mask_seconds = 0.0
        self._is_renewed = False

    def allowed(self) -> np.ndarray:
        """Return [vocab_size] bool: the tokens that may come next; the ends of sequence when the text is complete."""
        began = time.thread_time()
        bits = self._matcher.compute_bitmask()
        while self._matcher.is_error():
            fault = self._matcher.get_error()
            if not self._renew():
                raise RequestError(f"guided decoding failed: {_line(fault)}")
            bits = self._matcher.compute_bitmask()
        self._mask_seconds += time.thread_time() - began
        most = _MASK_SECONDS + _MASK_SECONDS_PER_TOKEN * len(self._tokens)
        if self._mask_seconds > most:
            raise RequestError(
                f"guided decoding took {self._mask_seconds:.1f} s for {len(self._tokens) + 1} tokens, expected at most "
                f"{most:.1f} s; make the form simpler"
            )
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(bool)[: self._vocab_size]
        mask = np.pad(mask, (0, self._vocab_size - len(mask)))
        mask[self._ends] = mask[self._end]
        return mask

    def advance(self, token: int) -> None:
        """Take a token that was allowed."""
        token = self._end if token in self._ends else token
        while not self._matcher.consume_token(token):
            fault = self._matcher.get_error()
            if not self._renew():
                raise RequestError(f"guided decoding does not allow token {token}: {_line(fault)}")
        self._tokens.append(token)

    def _renew(self) -> bool:
        """Go on with what is compiled anew, if others may have used up what the texts of a grammar share."""
        root = self._compiled.renewed(self._root)
        if root is None or root is self._root or self._is_renewed:
            return False
        self._root, self._is_renewed = root, True
        self._matcher = root.deep_copy()
        return self._matcher.consume_tokens(self._tokens)


class _Described:
    """A tokenizer as llguidance wants it described (its `TokenizerWrapper`).

    Attributes:
        tokens: token id -> its bytes.
        special_token_ids: tokens that do not appear in the text.
    """

    is_tokenizer_wrapper = True

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self._encode = encode
        self.tokens, self.special_token_ids = list(tokens), list(special_token_ids)
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self._hidden = {*special_token_ids}
        self._ids_of = {text: token for token, text in enumerate(tokens) if text and token not in self._hidden}
        self._longest = max(map(len, self._ids_of), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Spell a text that the grammar forces, without tokens that do not appear in the text.

        The spelling is that of the tokenizer, which the model was trained with; where that has hidden tokens, or the
        text is half a character, the longest tokens are taken.
        """
        data = text.encode() if isinstance(text, str) else text
        with contextlib.suppress(UnicodeDecodeError, RequestError):
            ids = self._encode(data.decode())
            if self._hidden.isdisjoint(ids) and all(token < len(self.tokens) for token in ids):
                return ids
        out: list[int] = []
        at = 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids_of), None)
            if end is None:
                break
            out.append(self._ids_of[data[at:end]])
            at = end
        return out


class Grammars:
    """Makes matchers for the vocabulary of one engine."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Keep what they need; the vocabulary is read when the first request is guided."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = tuple(eos_token_ids)
        self._choices = functools.lru_cache(_KEPT)(self._make_choices)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def compile(self, form: StructuredOutputsParams, max_tokens: int) -> Callable[[], Grammar]:
        """Return what makes matchers at the beginning of their text, which takes no time any more.

        Compiling may take seconds; it is done by the thread that calls, and others go on meanwhile.

        Args:
            form: what the text must be.
            max_tokens: most tokens of the text, its end of sequence included.

        Raises:
            RequestError: the form is wrong or too complex, or too long for any completion.
            EnvironmentFault: llguidance is needed and not installed.
        """
        if form.choice is not None:
            choices = self._choices(tuple(form.choice))
            choices.check(max_tokens)
            return lambda: ChoiceMatcher(choices, self._visible, self._ends, max_tokens)
        compiled = self._compiled(self._grammar(form))
        compiled.root()
        return lambda: Matcher(compiled, self._vocab_size, self._ends)

    def _compile(self, grammar: str) -> CompiledGrammar:
        """Compile a grammar in the library's own language, if it is not too complex."""
        try:
            fault = trial.fault(grammar, self._vocab_size)
            if fault is not None:
                raise RequestError(fault)
            return CompiledGrammar(self._library, self._described, grammar)
        except RequestError as error:
            raise RequestError(f"structured_outputs: the grammar cannot be used: {_line(str(error))}") from None

    def _make_choices(self, texts: tuple[str, ...]) -> Choices:
        return Choices(texts, self._visible, self._ends, self._vocab_size)

    @functools.cached_property
    def _hidden(self) -> frozenset[int]:
        """Tokens that do not appear in a text: special ones, and those that end it."""
        return self._tokenizer.special_ids | {*self._ends}

    @functools.cached_property
    def _visible(self) -> Vocabulary:
        texts = self._tokenizer.vocabulary.bytes_of[: self._vocab_size]
        return Vocabulary([b"" if token in self._hidden else text for token, text in enumerate(texts)])

    @functools.cached_property
    def _library(self) -> Any:
        try:
            import llguidance  # an optional dependency
        except ModuleNotFoundError:
            raise EnvironmentFault(
                f"guided decoding needs the module 'llguidance', which is not installed; {install('guided')}"
            ) from None
        return llguidance

    @functools.cached_property
    def _described(self) -> Any:
        """The vocabulary in the library's form; takes seconds for a large one."""
        tokens = self._tokenizer.vocabulary.bytes_of[: self._vocab_size]
        tokens = tokens + [b""] * (self._vocab_size - len(tokens))
        special = [token for token in sorted(self._hidden) if token < self._vocab_size]
        described = _Described(tokens, special, self._ends[0], self._tokenizer.encode)
        return self._library.LLTokenizer(described, n_vocab=self._vocab_size, eos_token=self._ends[0])

    def _grammar(self, form: StructuredOutputsParams) -> str:
        kind = self._library.LLMatcher
        if form.json is not None or form.json_object:
            schema = json.loads(form.json) if isinstance(form.json, str) else form.json
            if schema is None or schema is True:
                schema = {"type": "object"} if form.json_object else {}
            if form.disable_additional_properties:
                schema = _closed(schema)
            overrides: dict[str, Any] = {"whitespace_flexible": not form.disable_any_whitespace}
            if form.whitespace_pattern is not None:
                overrides["whitespace_pattern"] = form.whitespace_pattern
            try:
                return kind.grammar_from_json_schema(_bounded("json", json.dumps(schema)), overrides=overrides)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"structured_outputs: the JSON schema cannot be used: {_line(str(error))}") from None
        if form.regex is not None:
            return kind.grammar_from_regex(_bounded("regex", form.regex))
        assert form.grammar is not None
        return kind.grammar_from_lark(self._name_tokens(_bounded("grammar", form.grammar)))

    def _name_tokens(self, lark: str) -> str:
        """Name tokens by number where a Lark grammar names them by text, as `<think>`: the library knows only the
        names of special ones."""
        names = {
            text: token for token, text in self._tokenizer.added_texts.items() if re.fullmatch(r"<[^<>\s]+>", text)
        }
        named = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        if not named:
            return lark
        # scanning goes from left to right, so the slash of `</think>` begins no regular expression
        return re.sub(
            f"{_LARK_LITERALS}|(?P<name>{named})",
            lambda match: f"<[{names[match['name']]}]>" if match["name"] else match[0],
            lark,
        )


def _bounded(name: str, text: str) -> str:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > _MAX_BYTES:
        raise RequestError(
            f"structured_outputs.{name} has {size:,} bytes, expected at most {_MAX_BYTES:,}; make it smaller"
            + (", or name the texts in `choice`" if name == "json" else "")
        )
    return text


def _closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have no properties but those that it names; one that names none stays open.

    Only where a keyword holds schemas they are looked at: what `enum` or `const` holds is a value, and a property may
    be called like a keyword.
    """
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    out = dict(schema)
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, Mapping):
            out[key] = {name: _closed(one) for name, one in value.items()}
        elif key in _SCHEMAS:
            out[key] = _closed(value)
    if any(isinstance(schema.get(key), Mapping) for key in ("properties", "patternProperties")):
        out.setdefault("additionalProperties", False)
    return out


def _line(text: str) -> str:
    """Return a message of the library on one line, not too long."""
    text = " ".join(text.partition("<backtrace>")[0].split())
    return text if len(text) <= 300 else f"{text[:300]}…"
