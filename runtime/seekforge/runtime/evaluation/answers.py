"""Answers that are kept, so that an evaluation that was stopped goes on where it was.

A line is one answer, under the digest of all that it depends on: the engine, the tokens, the sampling parameters. An
answer of another engine, or to another question, has another digest and is never taken for one. Tasks and metrics are
no part of it: another metric, or another filter of the same answers, is computed from what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

from seekforge.common.errors import OutputError
from seekforge.common.reading import lines_of
from seekforge.common.records import Record, RecordError
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.segments import SegmentedText

#: The file of a folder of results that holds the answers.
ANSWERS: Final = "answers.jsonl"
#: Longest line: an answer of a million tokens has less.
_MOST_LINE_BYTES: Final = 256 << 20


class Answer(Record):
    """What the engine said to one question.

    Attributes:
        request: the digest of the question.
        logprob: sum over the tokens that were scored; None of a generated text.
        is_greedy: whether each of them was the likeliest.
        text: the generated text, of a conversation without its thought; None of a score.
        reasoning: the thought of a conversation.
        finish_reason: why the text ended.
        num_tokens: tokens that were generated.
    """

    request: str
    logprob: float | None = None
    is_greedy: bool = False
    text: str | None = None
    reasoning: str = ""
    finish_reason: str = ""
    num_tokens: int = 0


def request_digest(
    engine_digest: str,
    prompt: list[int] | SegmentedText,
    *,
    num_scored: int = 0,
    params: SamplingParams | None = None,
    repeat: int = 0,
) -> str:
    """Return the digest of a question: of everything that its answer depends on.

    Args:
        engine_digest: the digest of the engine's manifest.
        prompt: what the engine reads.
        num_scored: how many of its last tokens are scored.
        params: how a text is generated.
        repeat: which of several answers to the same sampled question it is.
    """
    facts: Mapping[str, Any] = {
        "engine": engine_digest,
        "prompt": asdict(prompt) if isinstance(prompt, SegmentedText) else prompt,
        "num_scored": num_scored,
        "params": None if params is None else asdict(params),
        "repeat": repeat,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class AnswerStore:
    """Answers by the digest of their question, in a file or in memory alone. Close it, or use it as a context manager.

    Attributes:
        num_read: how many were in the file when it was opened.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Read what the folder has; a last line that an interruption cut off is taken away.

        Args:
            folder: is made where it is not there; None keeps nothing.

        Raises:
            OutputError: the folder holds something else, or cannot be written.
        """
        self._answers: dict[str, Answer] = {}
        self._file: IO[str] | None = None
        if folder is not None:
            path = folder / ANSWERS
            if folder.is_dir() and not path.exists() and any(folder.iterdir()):
                raise OutputError(f"{folder}: holds files but no {ANSWERS}; choose a new folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    self._read(path)
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror or error}; choose another folder") from None
        self.num_read = len(self._answers)

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, digest: str) -> Answer | None:
        """Return the answer to the question of this digest; None where there is none yet."""
        return self._answers.get(digest)

    def add(self, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        self._answers[answer.request] = answer
        if self._file is not None:
            self._file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")  # pyright: ignore[reportArgumentType]
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as file:
            try:
                for line in lines_of(file, most=_MOST_LINE_BYTES):
                    if not line.endswith(b"\n"):
                        break
                    answer = Answer.model_validate_json(line.decode())
                    self._answers[answer.request] = answer
                    whole += len(line)
            except (RecordError, ValueError) as error:
                raise OutputError(
                    f"{path}: holds something else than answers ({error}); choose another folder"
                ) from None
        if whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)
