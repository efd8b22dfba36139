"""Ranks of a GPU engine on pretended GPUs compute what one rank does, and agree on what they capture."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.runtime.backends.ranks.test_backend import ALL, COMMON, GREEDY, PROMPTS, results
from tests.support.fake_rank_gpus import RankDevice, ThreadRanks, gpu_engine_of
from tests.support.made_once import made_once
from tests.support.rank_engines import rank_engine

from seekforge import LLM
from seekforge.common.errors import EngineError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import load_manifest
from seekforge.formats.step_io import StepInputs, lay_out
from seekforge.runtime.backends.ranks import device_rank
from seekforge.runtime.backends.ranks.device_rank import DeviceRank
from seekforge.runtime.backends.tensorrt import waiting
from seekforge.runtime.backends.tensorrt.device import Call
from seekforge.runtime.engine.engine_folder import Engine


@pytest.fixture(scope="session")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = rank_engine(tiny_checkpoint, ALL, tmp_path_factory)
    return (
        made_once(
            tmp_path_factory, "gpu-ranks", lambda root: gpu_engine_of(engine, tiny_checkpoint, root / "engine") and None
        )
        / "engine"
    )


def test_pretended_gpus_compute_what_one_rank_does(folder: Path, tiny_engines: dict[str, Path]) -> None:
    """Weights, caches and sums of each rank are its own: four GPUs in two stages, prefill in two chunks, and MTP."""
    manifest = load_manifest(folder)
    many, one = ThreadRanks(folder, manifest), Engine.open(tiny_engines["exact"]).open_backend(threads=1)
    try:
        for several, single in zip(results(many, {"logits"}), results(one, {"logits"}), strict=True):
            for name, expected in single.items():
                np.testing.assert_allclose(several[name], expected, atol=2e-5 * expected.std(), rtol=0, err_msg=name)
        for layer in (*manifest.cache.layers, manifest.cache.mtp_layer):
            expected = one.cache(f"latent_cache.{layer}")  # pyright: ignore[reportAttributeAccessIssue]
            value = many.cache(f"latent_cache.{layer}")
            np.testing.assert_allclose(value, expected, atol=2e-5 * expected.std(), rtol=0, err_msg=str(layer))
        sizes = [sum(len(block) for block in device.memory.values()) for device in many.devices.values()]
        whole = sum(file.bytes for file in Engine.open(tiny_engines["exact"]).manifest.files)
        assert max(sizes) < whole, "no rank holds the whole model"
        assert many.devices[0].opened == ["model.s0.plan"] and "mtp.s1.plan" in many.devices[3].opened
    finally:
        many.close()
        one.close()
    assert all(device.closed for device in many.devices.values())
    assert not any(device.memory for device in many.devices.values()), "everything is given back"


@pytest.mark.slow  # two engines generate, one of them on four pretended GPUs
def test_text_of_captured_steps_is_that_of_one_rank(
    folder: Path, tiny_engines: dict[str, Path], tiny_source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.3.self_attn.o_proj.weight_scale_inv"
    changed = {one: tiny_source.tensor(one) for one in (name, name.removesuffix("_scale_inv"))}
    changed[name] = changed[name] * np.float32(1.5)
    made: list[ThreadRanks] = []

    def open_backend(engine: Engine, **options: Any) -> Any:
        made.append(ThreadRanks(engine.folder, engine.manifest))
        return made[-1]

    told: list[list[tuple[int, ...]]] = []
    for number, engine in enumerate((tiny_engines["exact"], folder)):
        if number:
            monkeypatch.setattr(Engine, "open_backend", open_backend)
            engine = Engine(engine, load_manifest(engine))
        with LLM(engine, num_blocks=6, max_num_batched_tokens=64, num_speculative_tokens=2, self_check=False,
                 speculation_off_switch=False) as llm:  # fmt: skip
            before = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
            llm.update_weights(changed)
            told.append(before + [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)])
    assert told[0] == told[1]
    assert all(device.launches for device in made[0].devices.values()), "decode steps are captured graphs on all ranks"


def test_stages_work_at_once_on_a_decode_step_of_several_sequences(folder: Path) -> None:
    """The second stage gets through its first part only after the first stage has begun the second one."""
    ranks = ThreadRanks(folder, load_manifest(folder))
    begun = threading.Semaphore(0)
    met: list[bool] = []
    first, second = ranks.devices[0].plans[0], ranks.devices[2].plans[0]
    enqueue_first, enqueue_second = first.enqueue, second.enqueue

    def counted(call: Call) -> None:
        begun.release()
        enqueue_first(call)

    def awaiting(call: Call) -> None:
        if not met:
            met.append(begun.acquire(timeout=60) and begun.acquire(timeout=60))
        enqueue_second(call)

    step = lay_out([[token] for token in COMMON[:4]], [0] * 4, [[1], [2], [3], [4]])
    try:
        ranks.allocate_caches(6)
        whole = ranks.run(step, outputs={"logits"}).fetch("logits")
        first.enqueue, second.enqueue = counted, awaiting
        np.testing.assert_allclose(
            ranks.run(step, outputs={"logits"}, parts=2).fetch("logits"), whole, atol=2e-5 * whole.std(), rtol=0
        )
    finally:
        ranks.close()
    assert met == [True]


@pytest.mark.parametrize(
    "step",
    [
        lay_out([COMMON[:50], COMMON[7:40]], [0, 0], [[1], [2]], [3, 20, 49, 60, 82]),
        lay_out(
            [COMMON[row : row + 1 + row % 3] for row in range(5)], [0] * 5, [[1 + r] for r in range(5)], [0, 14, 4]
        ),
    ],
    ids=["columns", "rows"],
)
def test_micro_batches_change_nothing(folder: Path, step: StepInputs) -> None:
    """Few prompts, or many short ones, give the same results and caches in one step and in three parts of it."""
    manifest = load_manifest(folder)
    names = {"logits", "hidden"} | {spec.name for spec in manifest.graphs["model"].outputs if spec.role == "tap"}
    ranks = ThreadRanks(folder, manifest)
    told: list[dict[str, np.ndarray]] = []
    try:
        for parts in (1, 3):
            ranks.allocate_caches(7)
            given = ranks.run(step, outputs=names, parts=parts)
            told.append({name: given.fetch(name) for name in names})
            told[-1]["cache"] = ranks.cache("latent_cache.3")
    finally:
        ranks.close()
    whole, cut = told
    real = step.real
    for name, expected in whole.items():
        assert cut[name].shape == expected.shape, name
        if name in ("logits", "cache"):
            np.testing.assert_allclose(cut[name], expected, atol=2e-5 * expected.std(), err_msg=name)
        elif name == "hidden":
            there, here = (value.reshape(len(real), -1)[real] for value in (cut[name], expected))
            np.testing.assert_allclose(there, here, atol=2e-5 * here.std())
        else:
            there, here = (np.sort(value.reshape(len(real), -1))[real] for value in (cut[name], expected))
            np.testing.assert_array_equal(there, here, err_msg=name)


@pytest.mark.parametrize("stands_still", range(4))
def test_the_rank_whose_gpu_never_answers_is_the_first_to_say_so(
    folder: Path, stands_still: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks of its stage wait for its part of a sum, until they end their sums."""
    for name, seconds in (("PATIENCE_S", 0.3), ("AFTER_ABORT_S", 0.2), ("OTHERS_S", 1.0)):
        monkeypatch.setattr(waiting, name, seconds)
    said: list[tuple[int, str]] = []
    ranks = ThreadRanks(folder, load_manifest(folder), on_fault=lambda number, error: said.append((number, str(error))))
    ranks.allocate_caches(4)
    stage = stands_still // 2 * 2
    for number in (stage, stage + 1):
        group = ranks.devices[number].group
        ranks.devices[number].is_done = lambda number=number, group=group: number != stands_still and group.is_aborted
    with pytest.raises(EngineError) as caught:
        ranks.run(lay_out([COMMON[:3]], [0], [[1]]), outputs={"logits"})
    if stands_still == 0:
        said.insert(0, (0, str(caught.value)))
    number, words = said[0]
    assert number == stands_still
    assert words == "its GPU stands still, without an answer for 0 s; start the engine again"
    assert ranks.devices[stands_still].group.is_aborted, "and has ended its own sums"


@pytest.mark.parametrize("comes", [True, False])
def test_ranks_that_do_not_meet_inside_of_nccl_say_so(
    folder: Path, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A communicator that never answers is left: for its time, or as soon as a rank is lost."""
    manifest, never = load_manifest(folder), threading.Event()
    made: list[str] = []

    def make_group(*_: Any) -> Any:
        made.append("asked")
        never.wait()

    def open_device(folder: Path, manifest: Any, number: int, join: Any) -> Any:
        join(lambda: made.append("current"))

    def lost() -> None:
        if not comes:
            raise EngineError("rank 1 was ended by signal 9")

    collectives = SimpleNamespace(sum=lambda part: part)
    monkeypatch.setattr(device_rank, "MEETING_S", 0.1)
    words = "rank 1 was ended by signal 9" if not comes else "NCCL: rank 0 and those .* did not meet within 0 s"
    with pytest.raises(EngineError, match=f"^{words}$"):
        DeviceRank(
            folder, manifest, 0, collectives, groups=[b"", b""], lost=lost,  # pyright: ignore[reportArgumentType]
            open_device=open_device, make_group=make_group,
        )  # fmt: skip
    assert made == ["current", "asked"]
    never.set()


@pytest.mark.parametrize("refuses", ["capture", "context"])
def test_a_bucket_that_one_rank_cannot_capture_no_rank_captures(folder: Path, refuses: str) -> None:
    def edit(number: int, device: RankDevice) -> None:
        if number == 1 and refuses == "capture":
            device.capture_fault = EngineError("not here")
        if number == 1 and refuses == "context":
            device.capturable = False

    ranks = ThreadRanks(folder, load_manifest(folder), edit)
    ranks.allocate_caches(4)
    try:
        for position in range(4):
            step = lay_out([COMMON[position : position + 1]], [position], [[1]])
            assert np.isfinite(ranks.run(step, outputs={"logits"}).fetch("logits")).all()
        metrics = ranks.graph_metrics()
        assert (metrics.captured, metrics.launched, metrics.failed) == (0, 0, 1)
        assert [device.launches for number, device in sorted(ranks.devices.items())][:2] == [0, 0]
        assert all(ranks.devices[number].launches for number in (2, 3)), "the other stage captures"
    finally:
        ranks.close()
