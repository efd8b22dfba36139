"""What an evaluation leaves: results as plain values, and each question with its answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import OutputError
from seekforge.common.files import replace_file, write_json

RESULTS: Final = "results.json"
_NO_FILE_NAME: Final = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Score:
    """One number of a task or group.

    Attributes:
        task: its name.
        metric: what is measured.
        filter: what was made of the answers before; "none".
        value: the number.
        stderr: its standard error; None where there is none.
        num_fewshot: examples before each question; None of a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    num_fewshot: int | None


def scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the numbers of what lm_eval returned, tasks first and then groups."""
    shots = results.get("n-shot", {})
    for table in (results["results"], results.get("groups", {})):
        for task, values in table.items():
            if table is results["results"] and task in results.get("groups", {}):
                continue
            for key, value in values.items():
                metric, comma, kind = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                stderr = values.get(f"{metric}_stderr,{kind}")
                known = isinstance(stderr, int | float) and math.isfinite(stderr)
                yield Score(task, metric, kind, float(value), float(stderr) if known else None, shots.get(task))


def summary(results: Mapping[str, Any], *, engine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return results as one JSON object.

    Args:
        results: what lm_eval returned.
        engine: what was evaluated.
        settings: how.
    """
    return _plain(
        {
            "engine": engine,
            "settings": settings,
            "results": results["results"],
            "groups": results.get("groups", {}),
            "versions": results.get("versions", {}),
            "n-shot": results.get("n-shot", {}),
            "n-samples": results.get("n-samples", {}),
            "higher_is_better": results.get("higher_is_better", {}),
            "configs": results.get("configs", {}),
        }
    )


def write_results(folder: Path, result: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> None:
    """Write results.json, and samples_TASK.jsonl with each question, what was answered, and how that scored.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        for task, rows in samples.items():
            lines = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
            replace_file(folder / f"samples_{_NO_FILE_NAME.sub('_', task)}.jsonl", lines.encode(errors="replace"))
        write_json(folder / RESULTS, result)
    except OSError as error:
        raise OutputError(
            f"{folder}: {error.strerror or error}; the answers are kept, choose a place with room"
        ) from None


def _plain(value: Any) -> Any:
    """Return what JSON can say of a value: numbers of NumPy as numbers, what is no number as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    if isinstance(value, bool | str) or value is None:
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 1) == 0:
        value = item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else str(value)
