"""Guided decoding: which tokens keep the text within a grammar, by llguidance (the extra `guided`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from seekforge.plugins.errors import EnvironmentFault, RequestError
from seekforge.plugins.requirements import install
from seekforge.runtime.sampling import Guided


class Matcher:
    """The state of one text in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> np.ndarray:
        """Return [vocab_size] bool: the tokens that may come next; the end of sequence when the text is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"guided decoding failed: {self._matcher.get_error()}")
        found = np.unpackbits(bits, bitorder="little").astype(bool)[: self._vocab_size]
        return np.pad(found, (0, self._vocab_size - len(found)))

    def advance(self, token: int) -> None:
        """Take a token that was allowed."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"guided decoding does not allow token {token}: {self._matcher.get_error()}")


class Grammars:
    """Makes matchers for the vocabulary of one engine."""

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_id: int) -> None:
        """Read the vocabulary; takes seconds for a large one, so it is done when the first request is guided.

        Raises:
            EnvironmentFault: llguidance is not installed.
        """
        try:
            import llguidance  # an optional dependency
        except ModuleNotFoundError:
            raise EnvironmentFault(
                f"guided decoding needs the module 'llguidance', which is not installed; {install('guided')}"
            ) from None
        self._library: Any = llguidance
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(str(tokenizer_path), n_vocab=vocab_size, eos_token=eos_token_id)

    def matcher(self, guided: Guided) -> Matcher:
        """Return a matcher at the beginning of its text.

        Raises:
            RequestError: the grammar is wrong or too complex.
        """
        matcher = self._library.LLMatcher(self._tokenizer, self._grammar(guided), log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise RequestError(f"guided: the grammar cannot be used: {reason}")
        return Matcher(matcher, self._vocab_size)

    def _grammar(self, guided: Guided) -> str:
        kind = self._library.LLMatcher
        if guided.json_schema is not None:
            schema = guided.json_schema if isinstance(guided.json_schema, str) else json.dumps(guided.json_schema)
            return kind.grammar_from_json_schema(schema, overrides={"whitespace_flexible": guided.whitespace})
        if guided.regex is not None:
            return kind.grammar_from_regex(guided.regex)
        if guided.grammar is not None:
            return kind.grammar_from_lark(guided.grammar)
        assert guided.choice is not None
        return kind.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in guided.choice))
