"""Where a completion stands: inside a thought, which `</think>` ends, or behind it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seekforge.runtime.sequence import Grammar


class ThinkingBudget:
    """Counts the tokens of a thought and says when it has to end.

    A completion goes on where its prompt ends: a thought that is open there counts from its beginning. What comes after
    the end of a thought counts only if another begins.
    """

    def __init__(self, budget: int, start_id: int, end_id: int, prompt_ids: Sequence[int]) -> None:
        """Start behind a prompt.

        Args:
            budget: most tokens of a thought, the two that enclose it left out.
            start_id, end_id: tokens that begin and end a thought.
            prompt_ids: the prompt.
        """
        self._budget, self._start_id, self._end_id = budget, start_id, end_id
        self._count: int | None = None  # tokens of the open thought; None: there is none
        last = next((at for at in range(len(prompt_ids), 0, -1) if prompt_ids[at - 1] in (start_id, end_id)), 0)
        if last and prompt_ids[last - 1] == start_id:
            self._count = len(prompt_ids) - last

    def forced(self) -> int | None:
        """Return the token that has to be next; None: any may be."""
        return self._end_id if self._count is not None and self._count >= self._budget else None

    def advance(self, token: int) -> None:
        """Take a token."""
        if token == self._end_id:
            self._count = None
        elif token == self._start_id:
            self._count = 0
        elif self._count is not None:
            self._count += 1


class AfterReasoning:
    """A grammar that holds from the end of the thought on; before, only the end of sequence is refused."""

    def __init__(self, grammar: Grammar, end_id: int, thought: np.ndarray) -> None:
        """Start inside a thought.

        Args:
            grammar: what the text behind it must be.
            end_id: the token that ends it.
            thought: [vocab_size] bool, what it may hold, and its end.
        """
        self._grammar, self._end_id, self._thought = grammar, end_id, thought
        self._ended = False

    def allowed(self) -> np.ndarray:
        """Return [vocab_size] bool: the tokens that may come next."""
        return self._grammar.allowed() if self._ended else self._thought

    def advance(self, token: int) -> None:
        """Take a token that was allowed."""
        if self._ended:
            self._grammar.advance(token)
        else:
            self._ended = token == self._end_id
