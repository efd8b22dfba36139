"""What a build tells about how far it is: which events leave the compiler's process, and what they add up to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.tensorrt import worker
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import check, open_inputs
from seekforge.exporter.builder.tensorrt.compiler import Phases
from seekforge.formats.targets import load_target

#: Inner phases of a build by TensorRT-RTX 1.7, as (event, phase, parent or step, steps), shortened.
_EVENTS = [
    ("phase", "Building engine", None, 6), ("phase", "Cloning network graph", "Building engine", 2),
    ("step", "Cloning network graph", 0), ("step", "Cloning network graph", 1), ("finish", "Cloning network graph"),
    *(("step", "Building engine", step) for step in range(4)),
    ("phase", "Building engine from subgraph", "Building engine", 1),
    ("phase", "Optimizing graph", "Building engine from subgraph", 30),
    *(("step", "Optimizing graph", step) for step in range(30)), ("finish", "Optimizing graph"),
    ("phase", "Computing profile costs", "Building engine from subgraph", 10),
    ("phase", "Timing tactics", "Computing profile costs", 3), ("finish", "Timing tactics"),
    *(("step", "Computing profile costs", step) for step in range(10)), ("finish", "Computing profile costs"),
    ("step", "Building engine from subgraph", 0), ("finish", "Building engine from subgraph"),
    ("step", "Building engine", 4), ("finish", "Building engine"),
]  # fmt: skip


class Sent(worker.Reporter):
    """Keeps events instead of writing them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})


def reported(seconds_per_event: float, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what leaves the process when TensorRT tells `_EVENTS` at such intervals."""
    clock = itertools.count(1)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: next(clock) * seconds_per_event))
    reporter = Sent()
    monitor = worker._monitor(SimpleNamespace(IProgressMonitor=object), reporter)
    tell = {"phase": monitor.phase_start, "step": monitor.step_complete, "finish": monitor.phase_finish}
    for event, *arguments in _EVENTS:
        tell[event](*arguments)
    return reporter.events


@pytest.mark.parametrize("seconds", [0.0, 0.001, 1.0])
def test_no_step_of_the_outer_phases_is_dropped(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner phases do not use up what outer ones may say."""
    steps = [(one["name"], one["step"]) for one in reported(seconds, monkeypatch) if one["event"] == "step"]
    for outer, count in (("Building engine", 5), ("Building engine from subgraph", 1), ("Cloning network graph", 2)):
        assert [step for name, step in steps if name == outer] == list(range(count))
    inner = [step for name, step in steps if name == "Optimizing graph"]
    assert len(inner) == (30 if seconds == 1.0 else 1), "inner ones are told as often as people can see"


@pytest.mark.parametrize("seconds", [0.0, 0.001, 1.0])
def test_the_bar_moves_through_the_phase_that_takes_the_time(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Phases()
    seen = [(phases.update(event), event) for event in reported(seconds, monkeypatch)]
    values = [value for value, _ in seen]
    assert values == sorted(values) and values[-1] == 1.0
    start = next(value for value, event in seen if event["name"] == "Computing profile costs")
    stop = next(v for v, e in seen if (e["event"], e["name"]) == ("finish", "Computing profile costs"))
    assert start < 0.2 and stop == 1.0


def test_a_phase_begins_behind_those_before_it_in_the_same_step() -> None:
    phases = Phases()
    events = [
        ("phase", "all", 2), ("phase", "first", 2), ("step", "first", 0), ("phase", "second", 2), ("step", "second", 0),
        ("finish", "second", 0), ("finish", "first", 0), ("finish", "unknown", 0), ("finish", "all", 0),
    ]  # fmt: skip
    seen = [phases.update({"event": e, "name": n, "steps": k, "step": k}) for e, n, k in events]
    assert seen == [0.0, 0.0, 0.25, 0.25, 0.375, 0.5, 0.5, 0.5, 1.0]


class Bar(Stages):
    """Keeps what the bar of each stage was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seen: list[list[float]] = []

    @contextmanager
    def steps_bar(self, stage: str) -> Iterator[Callable[[float], None]]:
        self.seen.append([])
        yield self.seen[-1].append


@pytest.mark.slow
def test_progress_of_a_real_build_rises_to_its_end(
    tiny_programs: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    inputs, options, bar = open_inputs(tiny_programs["fp8"], tiny_checkpoint), gpu_options(kernels=False), Bar()
    planned = check(inputs, load_target("rtx4090"), options)
    build_gpu(inputs, planned, tmp_path / "engine", options=options, force=False, progress=bar)
    seen, digested = bar.seen
    assert digested == sorted(digested) and digested[-1] == 1.0, "weights are digested behind it"
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert seen[-2] > 0.9, "it was near its end before the end was called"
    assert max(after - before for before, after in itertools.pairwise(seen)) < 0.25, "and did not leap there"
