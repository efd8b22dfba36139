"""Rows of token ids for training: examples packed one behind another, documents told apart, learned tokens marked.

What a step sees depends on the seed and on the step's number alone, so that a resumed training sees the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from seekforge.common.errors import ConfigError
from seekforge.exporter.training import tasks
from seekforge.exporter.training.schedule import Mixture, Schedule
from seekforge.exporter.training.tasks import Example


@dataclass(frozen=True)
class Batch:
    """Rows for one pass.

    Attributes:
        ids: [B, L] int64.
        documents: [B, L] int64, the number of the example in its row.
        learned: [B, L] bool, tokens that the model has to write.
    """

    ids: Tensor
    documents: Tensor
    learned: Tensor


def encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[bool]]:
    """Return the token ids of an example, and which of them are learned."""
    ids: list[int] = []
    learned: list[bool] = []
    encodings = tokenizer.encode_batch([piece.text for piece in example], add_special_tokens=False)
    for piece, encoding in zip(example, encodings):
        ids += encoding.ids
        learned += [piece.learned] * len(encoding.ids)
    return ids, learned


def pack(tokenizer: Tokenizer, draw: Callable[[], Example], num_rows: int, length: int) -> Batch:
    """Fill rows with examples; the last of a row is cut."""
    rows = []
    for _ in range(num_rows):
        ids: list[int] = []
        learned: list[bool] = []
        documents: list[int] = []
        number = 0
        while len(ids) < length:
            one, mask = encode(tokenizer, draw())
            ids, learned, documents, number = ids + one, learned + mask, documents + [number] * len(one), number + 1
        rows.append((ids[:length], documents[:length], learned[:length]))
    return Batch(*(torch.tensor(column) for column in zip(*rows)))


class TaskData:
    """Draws batches of the four tasks."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.paragraphs = tasks.split_tales()[0]

    def batches(self, schedule: Schedule, step: int) -> list[tuple[Batch, float]]:
        """Return the batches of a step, and the weights of their losses."""
        return [(self.batch(mixture, step, part), w) for part, (mixture, w) in enumerate(schedule.mixtures(step))]

    def batch(self, mixture: Mixture, step: int, part: int = 0) -> Batch:
        """Return the batch of a step."""
        rng = random.Random(f"{self.seed} {step} {part}")
        names, weights = list(mixture.weights), list(mixture.weights.values())

        def draw() -> Example:
            match rng.choices(names, weights)[0]:
                case "arithmetic":
                    return tasks.arithmetic(rng)
                case "differences":
                    return tasks.differences(rng)
                case "digit sums":
                    return tasks.digit_sums(rng)
                case "recall":
                    return tasks.recall(rng, rng.randint(*mixture.pairs), rng.randint(1, mixture.questions))
                case "tools":
                    return tasks.tools(rng, mixture.tool_questions)
                case "short tools":
                    return tasks.tools(rng, rng.randint(1, 2), short=True)
                case _:
                    return tasks.tale(rng, self.paragraphs, rng.choice((200, 500)))

        return pack(self.tokenizer, draw, mixture.num_rows, mixture.length)


class ExampleData:
    """Draws batches from a list of examples.

    Args:
        tokenizer: the checkpoint's.
        examples: at least one; longer ones than a row are cut.
        seed: the seed of the order.
    """

    def __init__(self, tokenizer: Tokenizer, examples: list[Example], seed: int) -> None:
        self.tokenizer, self.examples, self.seed = tokenizer, examples, seed

    def batches(self, schedule: Schedule, step: int) -> list[tuple[Batch, float]]:
        """Return the one batch of a step."""
        rng = random.Random(f"{self.seed} {step}")
        batch = pack(self.tokenizer, lambda: rng.choice(self.examples), schedule.num_rows, schedule.length)
        return [(batch, 1.0)]

    def check(self, schedule: Schedule) -> None:
        """Refuse examples that a row has no room for.

        Raises:
            ConfigError: none has a learned token within a row.
        """
        for example in self.examples:
            _, learned = encode(self.tokenizer, example)
            if any(learned[1 : schedule.length]):
                return
        raise ConfigError(f"no example has a token to learn within its first {schedule.length} tokens")
