"""A nano checkpoint with random weights, its program, its engine and a file of tasks: made once per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support.made_once import made_once
from tests.support.parity_faults import build_engine

from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.program.export import export
from seekforge.formats.numerics import EXACT

ROWS: Final[tuple[dict[str, Any], ...]] = (
    {"task": "sums", "prompt": "one and one", "answer": "two", "match": "exact", "max_tokens": 4},
    {"task": "english", "text": "It is a truth universally acknowledged, that a single man in possession of a fortune"},
    {"task": "sums", "prompt": "two and two is", "answer": "four", "match": "final", "max_tokens": 9},
)


def random_nano_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint alone; only to be read."""
    root = made_once(tmp_path_factory, "random-nano-weights", lambda root: _write(root / "checkpoint"))
    return root / "checkpoint"


def _write(folder: Path) -> None:
    new_checkpoint(folder, "nano")


def random_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `checkpoint`, `program`, `engine` (exact numerics) and `tasks.jsonl`; only to be read."""

    def make(root: Path) -> None:
        _write(root / "checkpoint")
        export(root / "checkpoint", root / "program", numerics=EXACT)
        build_engine(root / "program", root / "checkpoint", root / "engine")
        (root / "tasks.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")

    return made_once(tmp_path_factory, "random-nano", make)
