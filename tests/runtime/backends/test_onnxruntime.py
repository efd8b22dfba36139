"""The ONNX Runtime backend: caches in place, outputs by subset, the MTP graph on demand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from seekforge.common.errors import EngineError
from seekforge.formats.program import GraphIO, TensorSpec
from seekforge.formats.step_io import MODEL, MTP, StepInputs
from seekforge.runtime.backends.onnxruntime import OrtGraph
from seekforge.runtime.backends.ort_device import OrtDevice
from seekforge.runtime.engine.engine_folder import Engine


def step(ids: list[int], blocks: list[int], start: int = 0, hidden: np.ndarray | None = None) -> StepInputs:
    positions = np.arange(start, start + len(ids))
    slots = np.array(blocks)[positions // 64] * 64 + positions % 64
    return StepInputs(
        np.array([ids]), positions[None], slots[None], np.array([blocks], np.int32), np.array([len(ids) - 1]), hidden
    )


@pytest.fixture
def backend(toy_engine: Path):
    backend = Engine.open(toy_engine).open_backend(threads=1)
    backend.allocate_caches(6)
    yield backend
    backend.close()


def test_a_step_reads_what_earlier_steps_wrote(backend, toy) -> None:
    ids = [(7 * i) % 300 for i in range(70)]
    backend.run(step(ids[:66], [4, 2]), outputs=())
    backend.run(step(ids[66:69], [4, 2], 66), outputs=())
    found = backend.run(step(ids[69:], [4, 2], 69), outputs={"logits"}).fetch("logits")
    np.testing.assert_allclose(found[0], toy.logits(ids), atol=1e-4)


def test_caches_are_written_in_place(backend) -> None:
    caches = backend._graphs["model"].caches
    before = {name: value.data_ptr() for name, value in caches.items()}
    backend.run(step([5, 6], [1]), outputs={"hidden"})
    assert {name: value.data_ptr() for name, value in caches.items()} == before
    rows = np.flatnonzero(caches["latent_cache.0"].numpy().any(axis=1))
    assert rows.tolist() == [64, 65]


def test_results_that_were_fetched_stay_when_the_next_ones_are_made(backend, toy) -> None:
    ids = [(7 * i) % 300 for i in range(12)]
    backend.run(step(ids[:6], [4]), outputs=())
    kept = [backend.run(step(ids[n : n + 1], [4], n), outputs={"logits"}).fetch("logits") for n in range(6, 10)]
    wider = backend.run(step(ids[10:], [4], 10), outputs={"logits", "hidden"})
    kept.append(wider.fetch("logits"))
    for known, logits in zip((7, 8, 9, 10, 12), kept):
        np.testing.assert_allclose(logits[0], toy.logits(ids[:known]), atol=1e-4)
    assert wider.fetch("hidden").shape[:2] == (1, 2)


def test_an_array_that_comes_again_is_read_again(backend, toy) -> None:
    """What lays out a decode step changes its arrays in place."""
    ids = [5, 6, 7, 8, 9]
    inputs = step(ids[:1], [1])
    for place, token in enumerate(ids):
        inputs.input_ids[0, 0], inputs.positions[0, 0], inputs.slot_mapping[0, 0] = token, place, 64 + place
        found = backend.run(inputs, outputs={"logits"}).fetch("logits")
        np.testing.assert_allclose(found[0], toy.logits(ids[: place + 1]), atol=1e-4)


def test_shapes_may_change_under_the_same_results(backend, toy) -> None:
    for count in (1, 1, 1, 3, 3, 3, 1, 2):
        found = backend.run(step([5, 6, 7][:count], [1]), outputs={"logits", "hidden"})
        np.testing.assert_allclose(found.fetch("logits")[0], toy.logits([5, 6, 7][:count]), atol=1e-4)
        assert found.fetch("hidden").shape[:2] == (1, count)


def test_steps_that_are_alike_are_bound_once(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binding is what a short step spends most of its time on outside of ONNX Runtime."""
    graph = backend._graphs["model"]
    made: list[object] = []
    plain = graph.session.io_binding
    monkeypatch.setattr(graph.session, "io_binding", lambda: made.append(plain()) or made[-1])
    for position in range(4):
        backend.run(step([5], [1], position), outputs={"logits"})
    assert len(made) == 1
    backend.allocate_caches(8)
    backend.run(step([5], [7]), outputs={"logits"})
    assert len(made) == 2 and np.flatnonzero(backend.cache("latent_cache.0").any(axis=1)).tolist() == [7 * 64]


def test_a_step_that_fails_is_none_that_others_are_bound_like(backend, toy) -> None:
    backend.run(step([5], [1]), outputs={"logits"})
    with pytest.raises(Exception, match="invalid indice"):
        backend.run(step([5], [99]), outputs={"logits"})
    found = backend.run(step([5], [1]), outputs={"logits"}).fetch("logits")
    np.testing.assert_allclose(found[0], toy.logits([5]), atol=1e-4)


def test_padding_touches_scrap_only(backend) -> None:
    inputs = step([5, 6], [1])
    inputs.slot_mapping[0, 1] = -1
    backend.run(inputs, outputs=())
    rows = np.flatnonzero(backend._graphs["model"].caches["latent_cache.0"].numpy().any(axis=1))
    assert set(rows) - set(range(64)) == {64}


def test_taps_do_not_change_the_logits(backend) -> None:
    plain = backend.run(step([5, 6, 7], [1]), outputs={"logits"}).fetch("logits")
    results = backend.run(step([5, 6, 7], [1]), outputs={"logits", "topk_indices.0"})
    assert results.fetch("logits").tobytes() == plain.tobytes()
    assert results.fetch("topk_indices.0").tolist() == [[[0], [1], [2]]]


def test_any_block_gives_the_same_result(backend) -> None:
    kept = backend.run(step([5], [1]), outputs={"logsumexp"}).fetch("logsumexp").copy()
    again = backend.run(step([5], [2]), outputs={"logsumexp"}).fetch("logsumexp")
    assert kept.tobytes() == again.tobytes()


def test_the_mtp_graph_has_its_own_caches(backend, toy) -> None:
    assert list(backend._graphs) == ["model"]
    hidden = np.ones((1, 2, 16), np.float32)
    found = backend.run(step([5, 6], [1], hidden=hidden), outputs={"logits"}, graph=MTP).fetch("logits")
    np.testing.assert_allclose(found[0], toy.logits([5, 6]) + toy.head.sum(0), atol=1e-4)
    assert not backend._graphs["model"].caches["latent_cache.0"].numpy().any()


def test_threads_of_a_graph_do_not_spin_while_another_runs(backend) -> None:
    """Drafts run two graphs by turns, each with threads of its own on the same cores."""
    backend.run(step([5], [1], hidden=np.zeros((1, 1, 16), np.float32)), outputs=(), graph=MTP)
    assert set(backend._graphs) == {"model", MTP}
    for graph in backend._graphs.values():
        options = graph.session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_an_absent_graph_is_named(backend) -> None:
    with pytest.raises(EngineError, match="has no graph 'draft'"):
        backend.run(step([5], [1]), outputs=(), graph="draft")


def test_a_broken_graph_is_one_line(toy_copy: Path) -> None:
    engine = Engine.open(toy_copy)
    (toy_copy / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot load it") as caught:
        engine.open_backend()
    assert "\n" not in str(caught.value)


def test_a_graph_of_which_nothing_is_wanted_is_not_run(tmp_path: Path) -> None:
    """As a rank's piece behind the logits, in a step that asks for hidden states alone; ONNX Runtime would refuse."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["sum.0"], ["logits"])],
        "g",
        [value("sum.0", TensorProto.FLOAT, ["N"])],
        [value("logits", TensorProto.FLOAT, ["N"])],
    )
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "model.1.onnx")
    spec = TensorSpec(name="sum.0", dtype="f32", shape=("N",), role="intermediate")
    described = GraphIO(
        file="model.1.onnx",
        sha256="",
        inputs=(spec,),
        outputs=(spec.model_copy(update={"name": "logits", "role": "result"}),),
        aliases={},
    )
    opened = OrtGraph(tmp_path, MODEL, described, 1, {}, OrtDevice())
    inputs = replace(step([1, 2], [1]), intermediate_tensors={"sum.0": np.ones(2, np.float32)})
    assert opened.run(inputs, {"logits"}).fetch("logits").tolist() == [1, 1]
    with pytest.raises(KeyError):
        opened.run(inputs, set()).fetch("logits")
