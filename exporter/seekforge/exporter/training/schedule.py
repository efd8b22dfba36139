"""What happens at which step of a training: learning rate, mixture of tasks, dense or sparse attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Steps until the learning rate is whole.
_WARM_UP_STEPS = 40
#: The learning rate never falls below this share.
_LEAST_FACTOR = 0.02
#: A list of a recall grows to its longest over this share of the steps.
_LISTS_GROW = 0.4
_PAIRS = (16, 52)
#: How often each task is drawn.
_TASKS = {"arithmetic": 4.6, "digit sums": 0.4, "recall": 2.4, "tales": 2.2, "short tools": 0.8}
#: The same in the last stage, for what is learned late.
_LAST_TASKS = {"arithmetic": 3.0, "differences": 3.0, "recall": 1.2, "tales": 2.2, "short tools": 2.6}


@dataclass(frozen=True)
class Mixture:
    """What the rows of one pass are made of.

    Attributes:
        weights: task -> how often it is drawn, relative to the others.
        num_rows, length: how many rows, and their tokens.
        pairs: fewest and most pairs in the list of a recall.
        questions, tool_questions: most questions about a list, and those of a conversation with tools.
    """

    weights: dict[str, float]
    num_rows: int
    length: int
    pairs: tuple[int, int] = (4, 48)
    questions: int = 12
    tool_questions: int = 6


@dataclass(frozen=True)
class Schedule:
    """The settings of a training; the defaults are those of `nano`.

    Attributes:
        steps: how many updates in all.
        last_share: share of them that is the last stage: what is learned late is drawn more often. Shares below are of
            the steps before it.
        last_rounds: parts of that stage, of equal length; in each the learning rate rises once more.
        last_rate: the learning rate at the beginning of each, as a share of the largest.
        num_rows, length: rows of a pass and their tokens.
        recall_steps: steps in the beginning that teach recall alone: the heads planted for it are lost to other tasks,
            unless they are of use before those come.
        held_steps: steps after those in which the attention of the first two layers is held as it is.
        slow_rate: factor on the learning rate of its matrices behind that.
        tools_length: tokens of that row.
        matrix_rate, other_rate: the largest learning rates, of Muon and of AdamW.
        weight_decay: the decay of what Muon updates.
        sparse_from: share of the steps after which attention is sparse; before it the indexer warms up beside dense
            attention.
        tools_from: share of the steps after which whole conversations with tools are learned, in every fourth step, and
            in every other one of the last stage.
        tools_weight: the weight of the loss of the row of one.
        mtp_weight: lambda of the MTP loss, in every other step.
        bias_rate: what the router's bias of an expert moves by in a step.
    """

    steps: int = 3800
    last_share: float = 800 / 3800
    last_rounds: int = 2
    last_rate: float = 0.3
    num_rows: int = 4
    length: int = 256
    recall_steps: int = 100
    held_steps: int = 900
    slow_rate: float = 0.3
    tools_length: int = 832
    matrix_rate: float = 6e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    sparse_from: float = 0.5
    tools_from: float = 0.2
    tools_weight: float = 0.5
    mtp_weight: float = 0.3
    bias_rate: float = 0.002

    def factor(self, step: int) -> float:
        """Return the share of the learning rate at a step: warm-up, then a cosine; lower ones in the last stage."""
        if self.is_last(step):
            share, highest = self._share_of_round(step), self.last_rate
        else:
            share, highest = step / self.main_steps, min(1.0, (step + 1) / _WARM_UP_STEPS)
        return max(highest * 0.5 * (1 + math.cos(math.pi * share)), _LEAST_FACTOR)

    def _share_of_round(self, step: int) -> float:
        number = min((step - self.main_steps) // self.round_steps, self.last_rounds - 1)
        begin = self.main_steps + number * self.round_steps
        end = self.steps if number == self.last_rounds - 1 else begin + self.round_steps
        return (step - begin) / (end - begin)

    @property
    def main_steps(self) -> int:
        """The steps before the last stage."""
        return self.steps - round(self.steps * self.last_share)

    @property
    def round_steps(self) -> int:
        """The steps of a round of the last stage; the last round has those that do not divide as well."""
        return max(1, (self.steps - self.main_steps) // self.last_rounds)

    def is_last(self, step: int) -> bool:
        """Whether a step is of the last stage."""
        return step >= self.main_steps

    def begins_round(self, step: int) -> bool:
        """Whether a step is the first of a round of the last stage."""
        number, at = divmod(step - self.main_steps, self.round_steps)
        return at == 0 and 0 <= number < self.last_rounds

    def holds(self, step: int) -> bool:
        """Whether the attention of the first two layers stays as it is."""
        return self.recall_steps <= step < self.recall_steps + self.held_steps

    def is_sparse(self, step: int) -> bool:
        """Whether attention sees the indexer's choice alone."""
        return step / self.main_steps >= self.sparse_from

    def mtp_weight_of(self, step: int) -> float:
        """Return lambda of a step."""
        return self.mtp_weight if step % 2 == 0 else 0.0

    def mixtures(self, step: int) -> list[tuple[Mixture, float]]:
        """Return what the passes of a step are made of, and the weights of their losses."""
        grown = min(1.0, step / self.main_steps / _LISTS_GROW)
        longest = _PAIRS[0] + int(grown * (_PAIRS[1] - _PAIRS[0]))
        tasks = _LAST_TASKS if self.is_last(step) else _TASKS if step >= self.recall_steps else {"recall": 1.0}
        passes = [(Mixture(tasks, self.num_rows, self.length, pairs=(4, longest), questions=12), 1.0)]
        if step / self.main_steps >= self.tools_from and step % (2 if self.is_last(step) else 4) == 0:
            passes.append((Mixture({"tools": 1.0}, 1, self.tools_length, tool_questions=6), self.tools_weight))
        return passes
