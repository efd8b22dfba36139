"""Scores of the four tasks on held-out items: whether each token of an answer is the most likely one.

A greedy generation writes exactly the answer if and only if that holds, so one pass over the whole text serves. Of a
thought the same is asked, which a generation that comes to the right answer some other way would not need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from seekforge.exporter.training import tasks
from seekforge.exporter.training.batches import encode
from seekforge.exporter.training.model import TrainedModel


@dataclass(frozen=True)
class Score:
    """What a task got.

    Attributes:
        num_items: items, or tokens of tales.
        value: share of items that are right, or the perplexity of tales.
    """

    num_items: int
    value: float


def score(
    model: TrainedModel,
    tokenizer: Tokenizer,
    rows: Iterable[dict[str, Any]],
    *,
    sparse: bool = True,
    random_choice: bool = False,
) -> dict[str, Score]:
    """Return the score of each task."""
    right: dict[str, list[float]] = {}
    for row in rows:
        right.setdefault(row["task"], []).extend(_judge(model, tokenizer, row, sparse, random_choice))
    scores = {}
    for task, values in right.items():
        mean = sum(values) / len(values)
        scores[task] = Score(len(values), math.exp(mean) if task == "english" else mean)
    return scores


def _judge(
    model: TrainedModel, tokenizer: Tokenizer, row: dict[str, Any], sparse: bool, random_choice: bool
) -> list[float]:
    if row["task"] == "english":
        example = [tasks.Piece(tasks.BOS), tasks.Piece(row["text"].removeprefix(tasks.BOS), True)]
    else:
        example = [tasks.Piece(row["prompt"]), tasks.Piece(_completion(row), True)]
    ids, learned = encode(tokenizer, example)
    tokens = torch.tensor([ids])
    context = model.context(torch.zeros_like(tokens), sparse=sparse)
    if random_choice:
        context.random_choice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden = model.hidden(tokens, context)[0, :-1]
        targets, where = tokens[0, 1:], torch.tensor(learned[1:])
        logits = F.linear(hidden[where], model.lm_head)
    if row["task"] == "english":
        return F.cross_entropy(logits, targets[where], reduction="none").tolist()
    return [float((logits.argmax(-1) == targets[where]).all())]


def _completion(row: dict[str, Any]) -> str:
    thought = ""
    if row["task"] == "arithmetic":
        first, second = row["prompt"].split("What is ")[1].split("?")[0].split(" + ")
        thought = tasks.sum_thought(int(first), int(second)) + tasks.ANSWER
    return f"{thought}{row['answer']}{tasks.EOS}"
