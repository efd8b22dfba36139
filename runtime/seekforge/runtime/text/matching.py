"""Finds the first of many words in a text that comes piece by piece (Aho and Corasick): constant work per symbol.

A symbol is whatever a word is made of: the characters of a text, or the bytes of one. What has been read so far is
one number, the node: the longest end of it that begins a word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

#: The node of a text of which no end begins a word.
ROOT = 0


class Automaton:
    """The words to look for.

    Attributes:
        depth: [nodes], how many symbols of the text a node stands for.
        fail: [nodes], the node of its longest shorter end.
        found: [nodes], the longest word that ends there, by number; −1: none does.
        begun: [nodes], how many symbols at the end of the text begin a word and do not complete it.
        words_through: [nodes], which words begin with what the node stands for.
    """

    def __init__(self, words: Sequence[Sequence[object]]) -> None:
        """Take words, none empty."""
        self._next: list[dict[object, int]] = [{}]
        self.depth, self.found, self.fail = [0], [-1], [ROOT]
        self.words_through: list[list[int]] = [[]]
        for number, word in enumerate(words):
            node = ROOT
            for symbol in word:
                after = self._next[node].get(symbol)
                if after is None:
                    after = self._next[node][symbol] = len(self._next)
                    self._next.append({})
                    self.depth.append(self.depth[node] + 1)
                    self.found.append(-1)
                    self.fail.append(ROOT)
                    self.words_through.append([])
                node = after
                self.words_through[node].append(number)
            self.found[node] = number
        queue = deque(self._next[ROOT].values())
        while queue:
            node = queue.popleft()
            for symbol, after in self._next[node].items():
                self.fail[after] = self.step(self.fail[node], symbol)
                queue.append(after)
            if self.found[node] < 0:
                self.found[node] = self.found[self.fail[node]]
        self.begun = [0] * len(self._next)
        for node in sorted(range(1, len(self._next)), key=self.depth.__getitem__):
            self.begun[node] = self.depth[node] if self._next[node] else self.begun[self.fail[node]]

    def step(self, node: int, symbol: object) -> int:
        """Return the node after one symbol more."""
        while True:
            after = self._next[node].get(symbol)
            if after is not None:
                return after
            if node == ROOT:
                return ROOT
            node = self.fail[node]

    def read(self, node: int, symbols: Iterable[object]) -> int:
        """Return the node after several symbols, whatever is found in them."""
        for symbol in symbols:
            node = self.step(node, symbol)
        return node
