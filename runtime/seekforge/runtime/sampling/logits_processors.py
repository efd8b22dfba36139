"""What requests change of their logits before they choose: bias, bans, penalties, grammar. numpy only.

How often a token was generated, and what a request adds to it, stands in tables with a row per running request and a
column per token: a step looks up the tokens it cares about, for all requests at once, and counts one token more. A
table is made when a request first needs it, and takes memory only where something was written.

For a row of which only the likeliest tokens are known, changes also say how many of the others they lower (those
weigh less than it seems), and which they raise (those must be known).
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np

from seekforge.runtime.row_index import RowIndex
from seekforge.runtime.sequence import Sequence


@dataclass(frozen=True)
class Edits:
    """The changes of N rows, in this order: bias, repetition, frequency and presence penalty, bans, grammar.

    Attributes:
        places: [N], each row's place in the tables; 0, where nothing is written, for rows without changes.
        repetition, frequency, presence: [N], f64.
        counts: [P, V], i32: how often a token was generated; None: no row is penalised.
        in_prompt: [P, V], bool; None: no row is penalised.
        bias: [P, V], f64, added; −inf bans. None: no row has any.
        num_lowered: [N], at most so many tokens become less likely, by other means than a grammar.
        num_raised: [N], so many tokens are of those that penalties may make more likely.
        favored: [N, X], tokens that a bias makes more likely; −1 fills up. None: there are none.
        banned_rows, banned_ids: [M], stop tokens that come too early.
        completing: row -> further tokens that cannot be chosen now, rising: they would complete a bad word.
        allowed: row -> [V] bool: its other tokens cannot be chosen.
    """

    places: np.ndarray
    repetition: np.ndarray
    frequency: np.ndarray
    presence: np.ndarray
    counts: np.ndarray | None
    in_prompt: np.ndarray | None
    bias: np.ndarray | None
    num_lowered: np.ndarray
    num_raised: np.ndarray
    favored: np.ndarray | None
    banned_rows: np.ndarray
    banned_ids: np.ndarray
    completing: dict[int, np.ndarray]
    allowed: dict[int, np.ndarray]

    def take(self, rows: np.ndarray) -> Edits:
        """Return some of the rows."""
        at = np.full(len(self.places), -1)
        at[rows] = np.arange(len(rows))
        banned_rows = at[self.banned_rows]
        names = ("places", "repetition", "frequency", "presence", "num_lowered", "num_raised")
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in names},
            favored=None if self.favored is None else self.favored[rows],
            banned_rows=banned_rows[banned_rows >= 0],
            banned_ids=self.banned_ids[banned_rows >= 0],
            completing={int(at[row]): tokens for row, tokens in self.completing.items() if at[row] >= 0},
            allowed={int(at[row]): mask for row, mask in self.allowed.items() if at[row] >= 0},
        )

    def apply(self, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the changed logits of the tokens `ids` of each row.

        Args:
            logits: [N, C], f64.
            ids: [N, C]; of −1, which is no token, the result means nothing.
        """
        places = self.places[:, None]
        out = logits.copy()
        if self.bias is not None:
            out += self.bias[places, ids]
        if self.counts is not None and self.in_prompt is not None:
            count = self.counts[places, ids]
            generated = count > 0
            if (self.repetition != 1).any():
                seen = generated | self.in_prompt[places, ids]
                factor = self.repetition[:, None]
                out = np.where(seen, np.where(out > 0, out / factor, out * factor), out)
            out -= self.frequency[:, None] * count + self.presence[:, None] * generated
        if len(self.banned_rows):
            pair, column = np.nonzero(ids[self.banned_rows] == self.banned_ids[:, None])
            out[self.banned_rows[pair], column] = -np.inf
        for row, tokens in self.completing.items():
            nearest = tokens[np.minimum(np.searchsorted(tokens, ids[row]), len(tokens) - 1)]
            out[row, nearest == ids[row]] = -np.inf
        for row, mask in self.allowed.items():
            out[row, ~mask[ids[row]]] = -np.inf
        return out

    def num_lowered_others(self, num_lowered: np.ndarray, num_others: int) -> np.ndarray:
        """Return [N] how many of the `num_others` tokens that are not known become less likely, at most.

        Args:
            num_lowered: [N], how many of the known do.
            num_others: tokens that are not known.
        """
        lowered = np.minimum(self.num_lowered - num_lowered, num_others)
        for row in self.allowed:
            lowered[row] = num_others
        return lowered

    def may_raise_others(self, ids: np.ndarray) -> np.ndarray:
        """Return [N] whether a penalty may make a token more likely that is not among the known `ids`, [N, C]."""
        if self.counts is None or self.in_prompt is None or not self.num_raised.any():
            return np.zeros(len(ids), bool)
        places = self.places[:, None]
        generated = self.counts[places, ids] > 0
        seen = generated | self.in_prompt[places, ids]
        by_repetition, by_others = raises(self.repetition, self.frequency, self.presence)
        return self.num_raised > by_repetition * seen.sum(1) + by_others * generated.sum(1)


def raises(repetition: np.ndarray, frequency: np.ndarray, presence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether penalties may raise tokens that were seen, and tokens that were generated, each [N]."""
    return repetition < 1, (frequency < 0) | (presence < 0)


class EditTables:
    """The tables of the running requests that change their logits.

    Attributes:
        version: counts up when a place gets another holder.
        counts, in_prompt, bias: the tables of `Edits`; row 0 stays empty.
        num_generated, num_seen: [P], different tokens that were generated, and that were generated or in the prompt.
    """

    def __init__(self, max_batch_size: int, vocab_size: int) -> None:
        """Make none yet."""
        self._shape = (max_batch_size + 1, vocab_size)
        self._places = RowIndex(max_batch_size)
        self.counts: np.ndarray | None = None
        self.in_prompt: np.ndarray | None = None
        self.bias: np.ndarray | None = None
        self._num_counted = [0] * self._shape[0]
        self.version = 0
        self.num_generated = np.zeros(self._shape[0], np.int64)
        self.num_seen = np.zeros(self._shape[0], np.int64)

    def place(self, sequence: Sequence) -> int:
        """Return the place of a running sequence; what does not change about it is written when it gets one."""
        known_place = self._places.find(sequence)
        if known_place is not None:
            return known_place + 1
        known_place, before = self._places.settle(sequence)
        place = known_place + 1
        self.version += 1
        if before is not None:
            self._erase(place, before)
        self._num_counted[place] = self.num_generated[place] = self.num_seen[place] = 0
        params, bans = sequence.params, always_banned(sequence)
        if params.has_penalties:
            if self.counts is None or self.in_prompt is None:
                self.counts, self.in_prompt = np.zeros(self._shape, np.int32), np.zeros(self._shape, bool)
            if params.repetition_penalty != 1:
                self.in_prompt[place, list(sequence.prompt_ids)] = True
                self.num_seen[place] = len(set(sequence.prompt_ids))
        if params.logit_bias or len(bans):
            if self.bias is None:
                self.bias = np.zeros(self._shape)
            self.bias[place, list(params.logit_bias)] = list(params.logit_bias.values())
            self.bias[place, bans] = -np.inf
        return place

    def count(self, sequences: Rows[Sequence], places: Rows[int]) -> None:
        """Count the tokens that these sequences have gained since they were counted last."""
        at: list[int] = []
        tokens: list[int] = []
        for sequence, place in zip(sequences, places, strict=True):
            total, known = len(sequence.output_ids), self._num_counted[place]
            if total == known + 1:
                at.append(place)
                tokens.append(sequence.last_id)
            elif total > known:  # drafts came true, or the sequence was computed anew
                ids, times = np.unique(sequence.output_ids[known:], return_counts=True)
                self._count(np.full(len(ids), place), ids, times)
            self._num_counted[place] = total
        if at:
            self._count(np.array(at), np.array(tokens), 1)

    def _count(self, places: np.ndarray, ids: np.ndarray, times: np.ndarray | int) -> None:
        """Count tokens, each pair of place and id once."""
        assert self.counts is not None and self.in_prompt is not None
        new = self.counts[places, ids] == 0
        self.counts[places, ids] += times
        np.add.at(self.num_generated, places, new)
        np.add.at(self.num_seen, places, new & ~self.in_prompt[places, ids])

    def _erase(self, place: int, sequence: Sequence) -> None:
        """Take back what a sequence wrote, and touch nothing else."""
        if self.counts is not None and self.in_prompt is not None:
            self.counts[place, sequence.output_ids] = 0
            self.in_prompt[place, list(sequence.prompt_ids)] = False
        if self.bias is not None:
            self.bias[place, list(sequence.params.logit_bias)] = 0
            self.bias[place, always_banned(sequence)] = 0


class EditedRows:
    """Rows of which some change their logits, as long as they stay together."""

    def __init__(self, tables: EditTables, sequences: Rows[Sequence]) -> None:
        """Give each a place in the tables and collect what stays the same from step to step."""
        self._tables, self._sequences = tables, sequences
        params = [sequence.params for sequence in sequences]
        self._places = np.array([tables.place(s) if s.params.edits_logits else 0 for s in sequences])
        self._penalised = [row for row, p in enumerate(params) if p.has_penalties]
        self._penalised_places = self._places[self._penalised].tolist()
        self._biased = any(p.logit_bias for p in params) or any(len(always_banned(s)) for s in sequences)
        self._guided = [row for row, s in enumerate(sequences) if s.grammar is not None or s.allowed is not None]
        self._banning = [row for row, s in enumerate(sequences) if s.params.min_tokens]
        self._worded = [(row, s, s.bad_words) for row, s in enumerate(sequences) if s.bad_words is not None]
        # beyond these bounds a penalty changes nothing but overflows
        self._repetition = np.array([min(max(p.repetition_penalty, 1e-100), 1e100) for p in params], np.float64)
        self._frequency = np.array([p.frequency_penalty for p in params], np.float64)
        self._presence = np.array([p.presence_penalty for p in params], np.float64)
        self._unlikely = np.array(
            [len(always_banned(s)) + sum(v < 0 for v in s.params.logit_bias.values()) for s in sequences]
        )
        favored = [[token for token, value in p.logit_bias.items() if value > 0] for p in params]
        width = max(map(len, favored))
        self._favored = np.array([ids + [-1] * (width - len(ids)) for ids in favored]) if width else None

    def next(self, alive: Rows[int]) -> tuple[Edits, dict[int, str]]:
        """Return what the next logits of some rows are changed by.

        Args:
            alive: the rows that still get tokens.

        Returns:
            The changes, and of rows whose grammar failed the reason, by their index in `alive`.
        """
        tables = self._tables
        if self._penalised:
            tables.count([self._sequences[row] for row in self._penalised], self._penalised_places)
        banned_rows: list[int] = []
        banned_ids: list[int] = []
        for row in self._banning:
            ids = banned_early(self._sequences[row])
            banned_rows += [row] * len(ids)
            banned_ids += ids
        completing: dict[int, np.ndarray] = {}
        for row, sequence, words in self._worded:
            tokens = words.banned_now(sequence.output_ids)
            if len(tokens):
                completing[row] = tokens
        seen, generated = tables.num_seen[self._places], tables.num_generated[self._places]
        by_repetition, by_others = raises(self._repetition, self._frequency, self._presence)
        lowered = (self._repetition > 1) * seen + ((self._frequency > 0) | (self._presence > 0)) * generated
        unlikely = self._unlikely
        if completing:
            unlikely = unlikely + [len(completing.get(row, ())) for row in range(len(seen))]
        edits = Edits(
            self._places,
            self._repetition,
            self._frequency,
            self._presence,
            tables.counts if self._penalised else None,
            tables.in_prompt if self._penalised else None,
            tables.bias if self._biased else None,
            lowered + unlikely + np.bincount(banned_rows, minlength=len(seen)),
            by_repetition * seen + by_others * generated,
            self._favored,
            np.array(banned_rows, np.int64),
            np.array(banned_ids, np.int64),
            completing,
            {},
        )
        if len(alive) < len(self._sequences):
            edits = edits.take(np.array(alive))
        broken: dict[int, str] = {}
        if self._guided:
            guided = set(self._guided)
            for index, row in enumerate(alive):
                if row not in guided:
                    continue
                grammar, allowed = self._sequences[row].grammar, self._sequences[row].allowed
                try:
                    if grammar is not None:
                        allowed = grammar.allowed() if allowed is None else grammar.allowed() & allowed
                except Exception as error:
                    broken[index] = reason(error)
                if allowed is not None:
                    edits.allowed[index] = allowed
        return edits, broken


_NONE = np.array([], np.int64)


def always_banned(sequence: Sequence) -> np.ndarray:
    """Return the tokens that hold a bad word by themselves."""
    return _NONE if sequence.bad_words is None else sequence.bad_words.bans.always


def banned_early(sequence: Sequence) -> list[int]:
    """Return the tokens that must not end the request yet."""
    return list(sequence.stop_ids | sequence.early_ids) if len(sequence.output_ids) < sequence.params.min_tokens else []


def reason(error: Exception) -> str:
    """Return one line on what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
