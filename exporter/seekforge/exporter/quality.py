"""The quality of an engine: tasks become tokens, a process of the runtime runs them, and what comes back is scored.

`build --quality` and `parity --quality` measure by this alike. Text becomes tokens here and nowhere else, so that each
engine, and PyTorch beside it, is given the same ones.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import ConfigError, OptionError
from seekforge.common.files import write_json
from seekforge.common.reading import LISTING_BYTES, read_text
from seekforge.common.system import child_environment
from seekforge.exporter.runtime_child import refusal
from seekforge.formats.checkpoint.tokenizer_file import guarded, read_tokenizer
from seekforge.formats.quality import PromptRow, QualityTasks, TaskQuality
from seekforge.formats.quality_run import ANSWER, RunAnswer, RunRequest, RunRow

_NUMBER: Final = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)


@dataclass(frozen=True)
class EncodedTasks:
    """Tasks as tokens.

    Attributes:
        tasks: the file.
        rows: the rows as an engine is given them.
        tokenizer: a `tokenizers.Tokenizer`.
    """

    tasks: QualityTasks
    rows: tuple[RunRow, ...]
    tokenizer: Any

    def score(
        self, completions: Sequence[Sequence[int]], nll_sums: Sequence[float | None], eos_token_ids: Iterable[int]
    ) -> tuple[TaskQuality, ...]:
        """Return what came of each task.

        Args:
            completions: the generated tokens of each row; those of texts are not looked at.
            nll_sums: sum of the negative log-likelihoods of each text's tokens but the first, in nats.
            eos_token_ids: ends of sequence, which are no part of a completion's text.
        """
        ends = frozenset(eos_token_ids)
        return tuple(self._score(task, completions, nll_sums, ends) for task in self.tasks.tasks)

    def _score(
        self, task: str, completions: Sequence[Sequence[int]], nll_sums: Sequence[float | None], ends: frozenset[int]
    ) -> TaskQuality:
        numbers = self.tasks.of(task)
        if not self.tasks.has_answers(task):
            tokens = sum(len(self.rows[number].ids) - 1 for number in numbers)
            total = sum(nll_sums[number] or 0.0 for number in numbers)
            return TaskQuality(task=task, num_rows=len(numbers), num_tokens=tokens, nll=total / tokens)
        right = 0
        for number in numbers:
            row = self.tasks.rows[number]
            assert isinstance(row, PromptRow)
            right += row.is_right(self.text([one for one in completions[number] if one not in ends]))
        tokens = sum(len(completions[number]) for number in numbers)
        return TaskQuality(task=task, num_rows=len(numbers), num_tokens=tokens, score=right / len(numbers))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return guarded(self.tokenizer.decode, list(ids), skip_special_tokens=False)


def encode(tasks: QualityTasks, tokenizer: Path, *, longest: int) -> EncodedTasks:
    """Make tokens of tasks.

    Args:
        tasks: the tasks.
        tokenizer: path of a tokenizer.json.
        longest: tokens of a sequence that whoever runs them accepts.

    Raises:
        ConfigError: the tokenizer cannot be read, or a row does not fit; it names file and line.
    """
    encoder = read_tokenizer(tokenizer, error=ConfigError, again="take the tokenizer.json of the checkpoint")
    rows: list[RunRow] = []
    for row, line in zip(tasks.rows, tasks.lines, strict=True):
        prompt = isinstance(row, PromptRow)
        ids = guarded(encoder.encode, row.prompt if prompt else row.text, add_special_tokens=False).ids
        max_tokens = row.max_tokens if prompt else 0
        least, needed = (1 if prompt else 2), len(ids) + max(max_tokens, 1)
        where = f"{tasks.path}, line {line}"
        if len(ids) < least:
            raise ConfigError(f"{where}: encodes to {len(ids)} tokens, expected at least {least}; give more text")
        if needed > longest:
            what = f"{len(ids)} tokens and {max_tokens} to generate" if prompt else f"{len(ids)} tokens and one after"
            raise ConfigError(f"{where}: needs {needed} tokens ({what}), {longest} are accepted; make it shorter")
        rows.append(RunRow(ids=tuple(ids), max_tokens=max_tokens))
    return EncodedTasks(tasks, tuple(rows), encoder)


def run_engine(
    engine: Path, request: RunRequest, out: Path, *, name: str | None = None, say: Callable[[str], object]
) -> RunAnswer:
    """Have the runtime run a request on an engine, in a process of its own.

    Args:
        engine: its folder.
        request: what to run.
        out: an empty folder, which gets the request, the answer and what was selected.
        name: what errors call the engine; None: by its folder.
        say: told each part of the work.

    Raises:
        EngineError: the runtime refused, with its own words.
    """
    write_json(out / _REQUEST, request.model_dump(mode="json"))
    command = [sys.executable, "-m", "seekforge.runtime.quality", str(engine), str(out / _REQUEST), str(out)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as faults:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=faults, text=True, errors="replace", env=child_environment()
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                say(line.strip())
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()
            code = child.wait()
        if code != 0:
            faults.seek(0)
            raise refusal(engine, name or str(engine), faults.read(), code)
    return RunAnswer.model_validate_json(read_text(out / ANSWER, most=LISTING_BYTES))


_REQUEST: Final = "request.json"


# --- bounds ---------------------------------------------------------------------------------------------------


def read_bounds(specs: Sequence[str], tasks: QualityTasks) -> dict[str, float]:
    """Return task -> bound: smallest score of a task with answers, largest perplexity of one with texts.

    Args:
        specs: `arithmetic=0.99`, `english=12.5`.
        tasks: the tasks that there are.

    Raises:
        OptionError: one is malformed, or names no task.
    """
    bounds: dict[str, float] = {}
    for spec in specs:
        task, equals, text = spec.partition("=")
        text = text.strip().strip('"')
        if not equals or not _NUMBER.fullmatch(text):
            raise OptionError(f"--min-quality has {spec!r:.80}, expected TASK=BOUND, such as arithmetic=0.99")
        if task not in tasks.tasks:
            raise OptionError(f"--min-quality names task {task!r:.80}, {tasks.path} has {', '.join(tasks.tasks)}")
        if task in bounds:
            raise OptionError(f"--min-quality names task {task!r} twice; give it one bound")
        value = float(text)
        if tasks.has_answers(task) and value > 1:
            raise OptionError(f"--min-quality has {spec!r:.80}: a score is at most 1; {task} has answers")
        if not tasks.has_answers(task) and not 1 <= value < float("inf"):
            raise OptionError(f"--min-quality has {spec!r:.80}: a perplexity is at least 1; {task} has texts")
        bounds[task] = value
    return bounds


def misses(results: Iterable[TaskQuality], bounds: Mapping[str, float]) -> list[str]:
    """Return a phrase for each task that misses its bound: what came and what was expected."""
    phrases: list[str] = []
    for one in results:
        bound = bounds.get(one.task)
        if bound is None:
            continue
        if one.score is not None and one.score < bound:
            phrases.append(f"{one.task} has score {one.score:.4g} in {one.num_rows} rows, expected at least {bound:g}")
        if one.perplexity is not None and one.perplexity > bound:
            phrases.append(f"{one.task} has perplexity {one.perplexity:.4g}, expected at most {bound:g}")
    return phrases
