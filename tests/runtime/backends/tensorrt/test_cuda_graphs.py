"""Captured steps by TensorRT's rules, on a device whose contexts go dirty when shapes change and that can refuse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.fake_gpu import FakeDevice, changed, with_layers_alike

from seekforge.common.errors import EngineError
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.step_io import StepInputs
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.backends.base import GraphMetrics
from seekforge.runtime.backends.tensorrt import backend as tensorrt
from seekforge.runtime.backends.tensorrt import cuda_graphs
from seekforge.runtime.backends.tensorrt.device import SHARED, Call

#: Rows of the two buckets.
A, B = 1, 3


def step(rows: int, position: int) -> StepInputs:
    """A decode step of so many sequences at one position."""
    where = np.full((rows, 1), position)
    blocks = 1 + np.arange(rows)[:, None]
    return StepInputs(where + 3, where, where + 64 * blocks, blocks.astype(np.int32), np.arange(rows))


def prompts(rows: int) -> StepInputs:
    """A step of prompts of 20 tokens, which is no bucket's."""
    where = np.broadcast_to(np.arange(20), (rows, 20))
    blocks = 1 + np.arange(rows)[:, None]
    return StepInputs(where + 3, where, where + 64 * blocks, blocks.astype(np.int32), np.arange(rows))


def open_backend(engine: Path) -> tensorrt.TensorRtBackend:
    """Open an engine and prefill four sequences: then no step here makes memory move, or reads what nobody wrote."""
    backend = tensorrt.TensorRtBackend(engine, load_manifest(engine))
    backend.allocate_caches(8)
    backend.run(prompts(4), outputs=["logits"])
    return backend


@pytest.fixture
def backend(gpu_engine: tuple[Path, Path], device: FakeDevice) -> Iterator[tensorrt.TensorRtBackend]:
    opened = open_backend(gpu_engine[0])
    device.enqueued.clear()
    yield opened
    opened.close()
    assert device.closed and not device.memory


@pytest.fixture
def expected(gpu_engine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what a step gives on a device that captures nothing."""
    plain = FakeDevice()
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "_open_gpu", lambda folder, manifest: plain)
        opened = open_backend(gpu_engine[0])
    monkeypatch.setattr(opened._captured, "start", lambda graph, bucket, profile: opened._enqueue(graph, profile))

    def run(rows: int, position: int) -> np.ndarray:
        return opened.run(step(rows, position), outputs=["logits"]).fetch("logits")

    return run


def logits(backend: tensorrt.TensorRtBackend, rows: int, position: int) -> np.ndarray:
    return backend.run(step(rows, position), outputs=["logits"]).fetch("logits")


def test_a_rank_that_fails_alone_does_not_add_up_twice(
    backend: tensorrt.TensorRtBackend, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on behind the sums of the step: to run it again in other contexts would wait for them forever."""
    monkeypatch.setattr(device, "group", SimpleNamespace(agree=lambda fine: fine))
    logits(backend, A, 0)
    enqueue = device.plans[0].enqueue

    def failing(call: Call) -> None:
        if call.context > SHARED:
            raise EngineError("a plugin failed")
        enqueue(call)

    monkeypatch.setattr(device.plans[0], "enqueue", failing)
    before = device.enqueues
    with pytest.raises(EngineError, match="a plugin failed"):
        logits(backend, A, 1)
    assert device.enqueues == before


def test_replaying_one_bucket_after_another_gives_its_own_bytes(
    backend: tensorrt.TensorRtBackend, device: FakeDevice, expected: Any
) -> None:
    for position, rows in enumerate([A, A, A, B, B, B, A, B, A, A, B]):
        assert np.array_equal(logits(backend, rows, position), expected(rows, position)), (position, rows)
    assert backend.graph_metrics() == GraphMetrics(captured=2, launched=7, failed=0)


def test_buckets_that_take_turns_are_captured_right_after_a_run_of_their_own_shapes(
    backend: tensorrt.TensorRtBackend, device: FakeDevice
) -> None:
    """A, B, A, B: when A comes the second time, the last shapes that any context saw were B's."""
    for position, rows in enumerate([A, B, A, B]):
        logits(backend, rows, position)
    assert backend.graph_metrics() == GraphMetrics(captured=2, launched=0, failed=0)
    (first, second) = (context for context, _, captured in device.enqueued if captured)
    assert first != second and 0 not in (first, second), "each bucket has its own context"
    own = [(context, captured) for context, _, captured in device.enqueued if context]
    assert own == [(first, False), (first, True), (second, False), (second, True)]
    assert device.capture_queries == 2


def test_kernels_are_compiled_for_steps_that_come_again_and_for_no_prompt(
    backend: tensorrt.TensorRtBackend, device: FakeDevice
) -> None:
    for position in range(4):
        logits(backend, A, position)
    assert all(specialized for _, specialized, _ in device.enqueued), "captured or not: a bucket gives the same bits"
    device.enqueued.clear()
    backend.run(prompts(1), outputs=["logits"])
    assert device.enqueued == [(0, False, False)]


FAULTS: dict[str, dict[str, Any]] = {
    "capture": {"capture_fault": EngineError("CUDA: operation not permitted when stream is capturing")},
    "memory of the graph": {"capture_fault": MemoryError("no GPU memory is free for a CUDA graph")},
    "not capturable": {"capturable": False},
    "no context": {"most_contexts": 0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bucket_that_cannot_be_captured_is_enqueued_told_once_and_not_tried_again(
    backend: tensorrt.TensorRtBackend, device: FakeDevice, expected: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in FAULTS[fault].items():
        setattr(device, name, value)
    with caplog.at_level(logging.WARNING):
        for position, rows in enumerate([A, B] * 5):
            assert np.array_equal(logits(backend, rows, position), expected(rows, position)), (position, rows)
    assert backend.graph_metrics() == GraphMetrics(captured=0, launched=0, failed=2)
    assert device.captures == (2 if "capture_fault" in FAULTS[fault] else 0), "each bucket once"
    (told,) = caplog.messages
    assert "cannot be captured in a CUDA graph" in told and "1 x 1 tokens of graph model" in told
    assert not any(key[0] != 0 for key in _contexts(device)), "their contexts are given back"
    for name, value in {"capture_fault": None, "capturable": True, "most_contexts": 9}.items():
        setattr(device, name, value)
    for position in range(3):
        logits(backend, 2, position)
    assert backend.graph_metrics() == GraphMetrics(captured=1, launched=1, failed=2), "others are captured"


def test_a_step_that_fails_whatever_runs_it_is_an_error(
    backend: tensorrt.TensorRtBackend, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(backend, A, 0)

    def fail(*arguments: object) -> None:
        raise EngineError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(device.plans[0], "enqueue", fail)
        with pytest.raises(EngineError, match="illegal memory access"):
            logits(backend, A, 1)


def test_buckets_that_are_too_many_give_back_their_graphs_and_contexts(
    backend: tensorrt.TensorRtBackend, device: FakeDevice, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_MOST", 2)
    for position, rows in enumerate([1, 1, 2, 2, 4, 4, 4, 1, 1, 4, 2]):
        assert np.array_equal(logits(backend, rows, position), expected(rows, position)), (position, rows)
        kept = {context for context, _ in _contexts(device) if context}
        assert len(kept) <= 2 and sum(bool(graph) for graph in device.graphs) == len(kept)
    assert backend.graph_metrics() == GraphMetrics(captured=5, launched=3, failed=0)


def test_memory_that_moves_takes_the_graphs_and_leaves_the_contexts(
    backend: tensorrt.TensorRtBackend, device: FakeDevice
) -> None:
    for position in range(3):
        logits(backend, A, position)
    before = set(_contexts(device))
    backend.allocate_caches(8)
    assert not any(device.graphs) and set(_contexts(device)) == before
    device.enqueued.clear()
    logits(backend, A, 0)
    assert [captured for _, _, captured in device.enqueued] == [False, True], "captured anew, after a plain run"
    assert set(_contexts(device)) == before


def test_a_plan_that_was_built_without_the_promise_is_never_tried(
    gpu_engine: tuple[Path, Path], device: FakeDevice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = changed(gpu_engine[0], tmp_path / "engine", lambda raw: raw.update(capturable={"model": False}))
    backend = open_backend(engine)
    with caplog.at_level(logging.WARNING):
        for position in range(5):
            logits(backend, A, position)
    assert not device.captures and not device.capture_queries
    assert backend.graph_metrics() == GraphMetrics()
    (told,) = caplog.messages
    assert "graph model was built without the promise" in told
    backend.close()


def test_layers_that_are_alike_share_the_context_of_their_bucket(
    gpu_engine: tuple[Path, Path], device: FakeDevice, tmp_path: Path
) -> None:
    backend = open_backend(with_layers_alike(gpu_engine[0], tmp_path / "engine"))
    for position in range(4):
        logits(backend, A, position)
    assert device.launches == 2
    (number,) = {context for context, _ in _contexts(device) if context}
    assert _contexts(device).count((number, True)) == 3, "one for each of the three plans"
    assert sum(len(graph) for graph in device.graphs) == 4, "runs of one step"
    backend.close()


def test_metrics_tell_of_graphs(gpu_engine: tuple[Path, Path], device: FakeDevice, toy_engine: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(gpu_engine[0], num_blocks=9) as llm:
        llm.generate([5, 6, 7], params)
        found = llm.metrics().graphs
        assert found.captured >= 1 and found.launched == device.launches > 5 and found.failed == 0
    with LLM(toy_engine, num_blocks=9) as llm:
        llm.generate([5, 6, 7], params)
        assert llm.metrics().graphs == GraphMetrics()


def _contexts(device: FakeDevice) -> list[tuple[int, bool]]:
    """Return (number, specialized) of every context that lives."""
    return [(number, specialized) for plan in device.plans for _, number, specialized in plan.contexts]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"latent_cache_out.0": "index_cache.0"},
            r"latent_cache_out\.0 shares its memory with index_cache\.0, the man",
        ),
        ({"hidden": "latent_cache.0"}, r"hidden shares its memory with latent_cache\.0, the manifest says with none"),
    ],
)
def test_a_plan_with_other_aliases_than_the_manifest_is_refused(
    gpu_engine: tuple[Path, Path], device: FakeDevice, told: dict[str, str], message: str
) -> None:
    device.aliases = told
    with pytest.raises(EngineError, match=message):
        open_backend(gpu_engine[0])


def test_aliases_that_the_library_tells_or_does_not_tell_are_taken(
    gpu_engine: tuple[Path, Path], device: FakeDevice
) -> None:
    device.aliases = {"latent_cache_out.0": "latent_cache.0"}  # nothing is told of the others
    open_backend(gpu_engine[0]).close()


def test_aliases_of_another_type_are_refused(gpu_engine: tuple[Path, Path], device: FakeDevice, tmp_path: Path) -> None:
    def edit(raw: dict[str, Any]) -> None:
        (spec,) = [one for one in raw["graphs"]["model"]["outputs"] if one["name"] == "latent_cache_out.0"]
        spec["dtype"] = "bf16"

    with pytest.raises(EngineError, match=r"'latent_cache_out\.0' and 'latent_cache\.0' are one cache of different"):
        open_backend(changed(gpu_engine[0], tmp_path / "engine", edit))
