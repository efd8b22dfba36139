"""The tokenizer of `nano`: learned from the tales and from what conversations consist of; digits stay single."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import Tokenizer

from seekforge.exporter.checkpoint.tokenizer import train_tokenizer
from seekforge.exporter.training import tasks

#: How often the words of lists and the text about tools are shown, so that they are worth merges.
_WORDS_SHOWN = 250
_TOOLS_SHOWN = 100


def task_tokenizer(vocab_size: int) -> Tokenizer:
    """Return the tokenizer that the tasks are trained with; the same for the same size."""
    return train_tokenizer(vocab_size, _texts())


def _texts() -> Iterator[str]:
    yield from (f"{_without_digits(paragraph)}\n\n" for paragraph in tasks.split_tales()[0])
    listed = "\n".join(f"{key} {value}" for key, value in zip(tasks.KEYS, tasks.VALUES * 4))
    for _ in range(_WORDS_SHOWN):
        yield tasks.recall_question(listed, "fox")
        yield "What is"
    use = tasks.ToolUse("What time is it in Rome?", tasks.tool_call("clock", "timezone", "Europe/Rome"), "", "")
    calculation = tasks.tool_call("calculator", "expression", "+")
    for _ in range(_TOOLS_SHOWN):
        yield _without_digits(tasks.tools_system())
        yield f"{use.question}{use.call}{calculation}{tasks.tool_result('')}I call a tool. The tool says it."
        yield from tasks.CITIES.values()


def _without_digits(text: str) -> str:
    return re.sub(r"\d", "", text)
