"""What an interrupted build left is taken only where it is whole, ours in form, and inside its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from seekforge.exporter.builder.tensorrt.compiler import Compiled
from seekforge.exporter.builder.tensorrt.resume import Parts

COMPILED = Compiled({"CONV": 3}, {"fp8": 2}, {"A": 1}, 5, 0.1, 2.5, 2.0, 1 << 20, "1.7", None, {"t": "f32"}, {}, [8])


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    (tmp_path / "plan").write_bytes(b"plan!")
    (tmp_path / "log").write_bytes(b"said")
    made = Parts(tmp_path / "parts")
    made.keep("k", tmp_path / "plan", COMPILED, tmp_path / "log")
    return made


def take(parts: Parts, folder: Path) -> Compiled | None:
    return parts.take("k", folder / "taken.plan", folder / "taken.log")


def test_a_finished_plan_is_taken(parts: Parts, tmp_path: Path) -> None:
    assert take(parts, tmp_path) == COMPILED
    assert (tmp_path / "taken.plan").read_bytes() == b"plan!" and (tmp_path / "taken.log").read_bytes() == b"said"


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "k.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")

    return edit


def _in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


EDITS: dict[str, Callable[[Path], object]] = {
    "a flipped plan": lambda folder: (folder / "k.plan").write_bytes(b"plam!"),
    "no log": lambda folder: (folder / "k.log").unlink(),
    "nested": lambda folder: (folder / "k.json").write_text("[" * 100_000),
    "no object": lambda folder: (folder / "k.json").write_text("[]"),
    "a field more": _edit(lambda raw: raw.update(evil=1)),
    "a field less": _edit(lambda raw: raw.pop("layers")),
    "text for a number": _edit(lambda raw: raw.update(seconds="1")),
    "a list for a mapping": _edit(lambda raw: raw.update(layers=[1])),
    "numbers that are text": _edit(lambda raw: raw.update(layers={"a": "1"})),
    "another size": _edit(lambda raw: raw.update(plan_bytes=6)),
    "a FIFO as settings": _in_place("k.json", os.mkfifo),
    "a FIFO as plan": _in_place("k.plan", os.mkfifo),
    "a FIFO as log": _in_place("k.log", os.mkfifo),
    "a log of somebody else": _in_place("k.log", lambda path: path.symlink_to(path.parent.parent / "log")),
    "a plan from elsewhere": _in_place("k.plan", lambda path: path.symlink_to(path.parent.parent / "plan")),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", EDITS)
def test_what_does_not_fit_is_made_again(name: str, parts: Parts, tmp_path: Path) -> None:
    EDITS[name](parts.folder)
    assert take(parts, tmp_path) is None
