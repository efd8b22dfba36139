"""What the trained nano model still can do in an engine: answers, drafts that come true, keys that matter, words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.made_once import made_once
from tests.support.trained_nano import trained_nano

from seekforge import LLM, SamplingParams, build, export, parity
from seekforge.exporter.checkpoint.tokenizer import BOS
from seekforge.exporter.parity.api import FORM_NAMES
from seekforge.exporter.training import tasks
from seekforge.formats.targets import CPU_PRECISIONS


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained nano model and an engine of it; do not write into it."""
    return trained_nano(tmp_path_factory)


def few(checkpoint: Path, out: Path, count: int) -> Path:
    """Write so many of the held-out items of each task."""
    rows = [json.loads(line) for line in (checkpoint / "quality.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [
        [row for row in rows if row["task"] == task][:count] for task in ("arithmetic", "recall", "tools", "english")
    ]
    out.write_text("".join(json.dumps(row) + "\n" for part in kept for row in part), encoding="utf-8")
    return out


def scores(entry: dict[str, Any]) -> dict[str, float]:
    return {one["task"]: one["score"] for one in entry["tasks"] if one["score"] is not None}


def losses(entry: dict[str, Any]) -> dict[str, float]:
    return {one["task"]: one["nll"] for one in entry["tasks"] if one["nll"] is not None}


def test_an_engine_answers_drafts_and_looks_at_what_matters(nano: Path, tmp_path: Path) -> None:
    rows = few(nano / "checkpoint", tmp_path / "tasks.jsonl", 2)
    result = parity(nano / "engine", checkpoint=nano / "checkpoint", quality=rows, threads=1)
    exact, engine = result.to_json()["entries"]
    for entry in (exact, engine):
        assert min(scores(entry).values()) >= 0.5, scores(entry)  # of two items each
    assert abs(losses(engine)["english"] - losses(exact)["english"]) < 0.03  # FP8 activations and caches, nats
    assert engine["recall"]["inside"] > 0.65
    assert engine["drafts"]["accepted"][0] / engine["drafts"]["proposed"][0] > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_precision_costs_answers(nano: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    checkpoint = nano / "checkpoint"

    def make(root: Path) -> None:
        export(checkpoint, root / "program", numerics="exact")
        for precision in CPU_PRECISIONS:
            build(root / "program", root / precision, target="cpu", checkpoint=checkpoint, precision=precision)

    engines = made_once(tmp_path_factory, "trained-nano-precisions", make)
    rows = few(checkpoint, tmp_path / "tasks.jsonl", 12)
    result = parity(
        [engines / precision for precision in CPU_PRECISIONS],
        checkpoint=checkpoint, quality=rows, forms=FORM_NAMES, threads=1,
    )  # fmt: skip
    exact, *others = result.to_json()["entries"]
    for entry in others:
        for task, share in scores(entry).items():
            assert share >= scores(exact)[task] - 0.17, (entry["name"], task)  # two of twelve
        assert abs(losses(entry)["english"] - losses(exact)["english"]) < 0.1, entry["name"]


def test_a_tale_reads_as_words(nano: Path) -> None:
    """Of all words that it writes nearly all are words of the tales."""
    known = set(re.findall(r"[a-z]+", "\n".join(tasks.tales()).lower()))
    params = SamplingParams(max_tokens=160, temperature=0.8, seed=0, ignore_eos=True)
    with LLM(nano / "engine") as llm:
        outputs = llm.generate([f"{BOS}Once upon a time", f"{BOS}The king"], params)
    texts = [re.sub(r"\S*$", "", output.outputs[0].text) for output in outputs]  # the last word may be cut
    written = re.findall(r"[a-z]+", " ".join(texts).lower())
    assert len(written) > 100
    assert sum(word in known for word in written) / len(written) > 0.9, texts
