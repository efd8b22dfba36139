"""Texts that must not be generated: which tokens would complete one now, whatever tokens it is spelled with.

A text is banned as bytes. UTF-8 shows where characters begin, so the text holds a word exactly if its bytes hold the
word's. Tokens without text (special ones, those that end the request) neither spell nor interrupt a word; a word that
holds the text of such a token is looked for where these are written out as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seekforge.runtime.text.matching import ROOT, Automaton
from seekforge.runtime.text.vocabulary import Vocabulary


class Bans:
    """Words that are banned together, for any number of requests. Thread-safe: what is kept is only ever added to.

    Attributes:
        always: tokens that hold a word by themselves, rising.
    """

    def __init__(self, words: Sequence[str], vocabulary: Vocabulary, hidden: frozenset[int]) -> None:
        """Prepare.

        Args:
            words: none empty.
            vocabulary: the vocabulary of the model.
            hidden: tokens that have no text.
        """
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._hidden_ids = np.array(sorted(hidden), np.int64)
        encoded = [word.encode() for word in words]
        hidden_texts = [
            text for token in hidden if token < len(vocabulary.bytes_of) and (text := vocabulary.bytes_of[token])
        ]
        named = [word for word in encoded if any(text in word for text in hidden_texts)]
        self._ways = [(encoded, Automaton(encoded), False)]
        if named:
            self._ways.append((named, Automaton(named), True))
        empty = np.array([], np.int64)
        self.always = empty
        for texts, _, written in self._ways:
            ids = [vocabulary.containing(word) for word in texts]
            self.always = np.union1d(self.always, self._seen(np.concatenate([empty, *ids]), written))
        self._completing: dict[tuple[int, ...], np.ndarray] = {self.start: empty}

    @property
    def start(self) -> tuple[int, ...]:
        """The state of an empty text."""
        return (ROOT,) * len(self._ways)

    def after(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the state after one token more."""
        table = self._vocabulary.bytes_of
        text = table[token] if token < len(table) else b""
        hidden = token in self._hidden
        return tuple(
            node if hidden and not written else automaton.read(node, text)
            for node, (_, automaton, written) in zip(state, self._ways, strict=True)
        )

    def completing(self, state: tuple[int, ...]) -> np.ndarray:
        """Return the tokens, rising, that would complete a word which the text has begun; not all of `always`."""
        tokens = self._completing.get(state)
        if tokens is None:
            parts = [np.array([], np.int64)]
            for node, (texts, automaton, written) in zip(state, self._ways, strict=True):
                while node != ROOT:
                    depth = automaton.depth[node]
                    rests = {texts[number][depth:] for number in automaton.words_through[node]} - {b""}
                    parts += [self._seen(self._vocabulary.starting(rest), written) for rest in rests]
                    node = automaton.fail[node]
            tokens = self._completing[state] = np.unique(np.concatenate(parts))
        return tokens

    def _seen(self, ids: np.ndarray, written: bool) -> np.ndarray:
        return ids if written or not len(self._hidden_ids) else ids[~np.isin(ids, self._hidden_ids)]


class BadWords:
    """The bad words of one completion.

    Attributes:
        bans: shared by all that ban the same.
    """

    def __init__(self, bans: Bans) -> None:
        self.bans = bans
        self._state, self._num_read = bans.start, 0

    def banned_now(self, output_ids: Sequence[int]) -> np.ndarray:
        """Return the tokens, rising, that cannot follow what was generated, besides those that never can.

        Args:
            output_ids: tokens generated so far; those of the last call and perhaps more.
        """
        for token in output_ids[self._num_read :]:
            self._state = self.bans.after(self._state, token)
        self._num_read = len(output_ids)
        return self.bans.completing(self._state)
