"""The TensorRT backend on a fake device, whose memory is bytes and whose plans are run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tests.support.fake_gpu import FakeDevice, changed, in_two_plans, with_layers_alike
from tests.support.samples import audit_of

from seekforge.common.errors import CheckpointError, EngineError
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.engine.manifest import digest_file, load_manifest
from seekforge.formats.loader import LoadProgress
from seekforge.formats.program import load_bindings
from seekforge.formats.step_io import StepInputs
from seekforge.formats.weight_recipes import tensors_of
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.backends.tensorrt import backend as tensorrt
from seekforge.runtime.backends.tensorrt.device_weights import DeviceWeights
from seekforge.runtime.backends.tensorrt.step_shapes import halves, next_power_of_two, padded
from seekforge.runtime.cli.main import main
from seekforge.runtime.engine.engine_folder import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.mark.parametrize("drafts", [0, 2])
def test_an_engine_of_a_gpu_generates_what_numpy_says(gpu_engine, device: FakeDevice, toy, drafts: int) -> None:
    prompts = [list(range(3, 3 + length)) for length in (1, 5, 64, 70, 130)]
    options = {"num_speculative_tokens": drafts, "speculation_off_switch": False}
    with LLM(gpu_engine[0], num_blocks=40, **options) as llm:
        assert llm.self_check is not None
        outputs = llm.generate(prompts, GREEDY)
        assert [list(o.outputs[0].token_ids) for o in outputs] == [toy.greedy(p, 10) for p in prompts]
        sampled = SamplingParams(seed=1, max_tokens=6, ignore_eos=True, logprobs=2)
        assert llm.generate(prompts, sampled) != []
    assert device.closed and not device.memory, "all device memory is given back"
    assert device.launches > 5, "decode steps are captured graphs"


def test_weights_are_streamed_once_and_shared_by_the_graphs(gpu_engine, device: FakeDevice, toy) -> None:
    told: list[tuple[int, int]] = []
    seen = lambda load: told.append((load.done_bytes, load.total_bytes))  # noqa: E731
    with LLM(gpu_engine[0], num_blocks=9, self_check=False, on_load=seen) as llm:
        before = device.uploaded_bytes
        assert told[-1] == (before, before), "progress ends when all is loaded"
        assert before == toy.embedding.nbytes + toy.head.nbytes
        llm._core.backend._open("mtp")
        assert device.uploaded_bytes == before
        first = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
        llm.update_weights({"head.weight": np.ascontiguousarray(toy.head[:, ::-1])})
        flipped = replace(toy, head=np.ascontiguousarray(toy.head[:, ::-1]))
        assert list(llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids) == flipped.greedy([5, 6, 7], 10)
        assert list(first) == toy.greedy([5, 6, 7], 10)


def test_a_model_in_several_plans_gives_the_same(gpu_engine, device: FakeDevice, toy, tmp_path: Path) -> None:
    prompts = [list(range(3, 3 + length)) for length in (1, 70, 130)]
    options = {"num_speculative_tokens": 2, "speculation_off_switch": False}
    with LLM(in_two_plans(gpu_engine[0], tmp_path / "engine"), num_blocks=40, **options) as llm:
        assert llm.self_check is not None
        outputs = llm.generate(prompts, replace(GREEDY, max_tokens=30))
        assert [list(o.outputs[0].token_ids) for o in outputs] == [toy.greedy(p, 30) for p in prompts]
        assert device.launches > 0, "both plans are in one captured graph"
    assert not device.memory


def test_layers_that_are_alike_are_run_by_one_plan(gpu_engine, device: FakeDevice, toy, tmp_path: Path) -> None:
    prompts = [list(range(3, 3 + length)) for length in (1, 70, 130)]
    engine = with_layers_alike(gpu_engine[0], tmp_path / "engine")
    with LLM(engine, num_blocks=40) as llm:
        assert sorted(device.opened) == ["model.0.onnx", "model.1.onnx", "model.scale.onnx"], "each plan once"
        outputs = llm.generate(prompts, GREEDY)
        assert [list(o.outputs[0].token_ids) for o in outputs] == [toy.greedy(p, 10) for p in prompts]
        assert device.launches > 0
        llm.update_weights({"half": np.full(16, 0.25, np.float32)})
        weaker = replace(toy, head=toy.head * np.float32(0.5))
        (sampled,) = llm.generate(prompts[0], SamplingParams(temperature=0, max_tokens=1, logprobs=1))[0].outputs
        expected = weaker.logits(prompts[0])
        expected = expected - np.log(np.exp(expected).sum())
        assert sampled.logprobs[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert not device.memory


def test_taps_of_layers_that_are_alike_lie_in_one_place_until_they_are_looked_at(
    gpu_engine, device: FakeDevice, tmp_path: Path
) -> None:
    engine = with_layers_alike(gpu_engine[0], tmp_path / "engine")
    backend = tensorrt.TensorRtBackend(engine, load_manifest(engine))
    backend.allocate_caches(4)
    graph = backend._graphs["model"]
    rows = np.arange(3)[:, None]
    logits: list[np.ndarray] = []
    looked: set[str] = set()
    for position, shown in enumerate(
        [(), (), ("chosen.0",), ("chosen.1",), ("chosen.0", "chosen.1"), ("chosen.1",), (), ()]
    ):
        where = np.full((3, 1), position)
        step = StepInputs(where + 3, where, where + 64 * (1 + rows), (1 + rows).astype(np.int32), np.arange(3))
        found = backend.run(step, outputs=["logits", *shown])
        seen = {name: found.fetch(name) for name in shown}
        taken = {
            name for name, buffer in graph.buffers.items() if name.startswith(("unread", "chosen")) and buffer.address
        }
        looked |= set(shown)
        assert taken == {"unread.0"} | looked
        if len(shown) == 2:
            assert seen["chosen.0"].any() and np.array_equal(seen["chosen.0"], 2 * seen["chosen.1"])
        logits.append(found.fetch("logits"))
    assert device.launches == 1 and device.captures == 3, "a captured graph is of the taps that were looked at"
    assert backend.cache("kept.0").any()
    np.testing.assert_allclose(backend.cache("kept.0"), 2 * backend.cache("kept.1"), rtol=1e-5)
    backend.close()
    plain = tensorrt.TensorRtBackend(engine, load_manifest(engine))
    plain.allocate_caches(4)
    for position, expected in enumerate(logits):
        where = np.full((3, 1), position)
        step = StepInputs(where + 3, where, where + 64 * (1 + rows), (1 + rows).astype(np.int32), np.arange(3))
        assert np.array_equal(plain.run(step, outputs=["logits"]).fetch("logits"), expected)
    plain.close()


def test_a_step_without_memory_does_not_leave_graphs_of_freed_memory(
    gpu_engine, device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of a wide step get their room, its tap does not; a narrow step then finds room enough."""
    engine = with_layers_alike(gpu_engine[0], tmp_path / "engine")
    backend = tensorrt.TensorRtBackend(engine, load_manifest(engine))
    backend.allocate_caches(4)

    def step(position: int, width: int) -> StepInputs:
        where = np.arange(position, position + width)[None]
        return StepInputs(where + 3, where, where + 64, np.ones((1, 1), np.int32), np.zeros(1, np.int64))

    found = [backend.run(step(position, 1), outputs=["logits"]).fetch("logits") for position in range(3)]
    assert device.launches == 1
    tap = backend._graphs["model"].buffers["chosen.1"]
    with monkeypatch.context() as patch:
        patch.setattr(tap, "reserve", lambda num_bytes: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            backend.run(step(3, 20), outputs=["logits", "chosen.1"])
    again = backend.run(step(2, 1), outputs=["logits"]).fetch("logits")
    assert device.launches == 1 and again.shape == found[-1].shape
    backend.close()


def test_every_plan_has_a_digest(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    engine = with_layers_alike(gpu_engine[0], tmp_path / "engine")

    def edit(raw: dict[str, Any]) -> None:
        raw["files"] = [file for file in raw["files"] if file["path"] != "model.scale.onnx"]

    with pytest.raises(EngineError, match=r"'model\.scale\.onnx' has no digest under 'files'"):
        LLM(changed(engine, tmp_path / "other", edit), num_blocks=9)
    assert not device.opened


def test_stages_of_one_plan_must_be_alike(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    engine = with_layers_alike(gpu_engine[0], tmp_path / "engine")

    def edit(raw: dict[str, Any]) -> None:
        raw["stages"]["model"][2]["inputs"][1]["shape"] = [32]

    with pytest.raises(EngineError, match=r"model\.scale\.onnx: the stages that it runs are not alike"):
        LLM(changed(engine, tmp_path / "other", edit), num_blocks=9)


def _inputs(raw: dict[str, Any], graph: str) -> set[str]:
    return {spec["name"] for spec in raw["graphs"][graph]["inputs"]}


def _profiles(raw: dict[str, Any]) -> None:
    """Decode: 8 rows of 3 tokens; prefill: 2 rows of 512. At most 40 cache blocks."""

    def shapes(batch: int, width: int) -> dict[str, list[list[int]]]:
        rows = batch * width
        found = {name: [[1, 1], [1, 1], [batch, width]] for name in ("input_ids", "positions", "slot_mapping")}
        found |= {"block_table": [[1, 1], [1, 4], [batch, 16]], "logits_index": [[1], [1], [rows]]}
        return found | {f"latent_cache.{layer}": [[64, 16], [64, 16], [40 * 64, 16]] for layer in (0, 1)}

    sizes = {"decode": (8, 3), "prefill": (2, 512)}
    raw["profiles"] = {
        name: {
            plan: {tensor: bounds for tensor, bounds in shapes(*size).items() if tensor in _inputs(raw, plan)}
            for plan in ("model", "mtp")
        }
        for name, size in sizes.items()
    }
    for graph_io in raw["graphs"].values():
        for spec in graph_io["inputs"]:
            if spec["role"] == "cache":
                spec["shape"][0] = "NS"


def test_steps_take_the_profile_that_holds_them(gpu_engine, device: FakeDevice, toy, tmp_path: Path) -> None:
    """Five prompts at once are more rows than the prefill profile takes: such a step is run in parts."""
    engine = changed(gpu_engine[0], tmp_path / "engine", _profiles)
    prompts = [list(range(3, 3 + length)) for length in (40, 42, 44, 41, 43)]
    with LLM(engine, num_blocks=40, num_speculative_tokens=2, speculation_off_switch=False) as llm:
        device.profiles.clear()
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, prompt_logprobs=1)
        )
        assert [list(o.outputs[0].token_ids) for o in outputs] == [toy.greedy(p, 10) for p in prompts]
        assert {0, 1} == set(device.profiles)
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = toy.logits(prompt[:7])
            expected = logits[prompt[7]] - np.log(np.exp(logits).sum())
            assert output.prompt_logprobs is not None
            (found,) = [one for one in output.prompt_logprobs if one is not None and one.token_id == prompt[7]]
            assert found.logprob == pytest.approx(expected, abs=1e-4)
        with pytest.raises(EngineError, match=r"a step of 513 tokens .* is beyond every profile"):
            llm._core.backend.run(
                StepInputs(
                    np.zeros((1, 513), np.int64),
                    np.zeros((1, 513), np.int64),
                    np.full((1, 513), -1, np.int64),
                    np.zeros((1, 9), np.int32),
                    np.zeros(1, np.int64),
                ),
                outputs=["logits"],
            )
    assert device.closed and not device.memory
    with pytest.raises(EngineError, match="41 cache blocks were asked for, the engine was built for at most 40"):
        LLM(engine, num_blocks=41)


def test_debug_tensors_are_shown_when_asked_for_and_change_nothing(
    gpu_engine, device: FakeDevice, tmp_path: Path
) -> None:
    """Of an engine built with --taps: they are no outputs, and steps that show them are neither padded nor captured."""

    def edit(raw: dict[str, Any]) -> None:
        path = tmp_path / "engine" / "model.onnx"
        model = onnx.load(path)
        model.graph.output.append(onnx.helper.make_tensor_value_info("mixed", 1, ["B", "Q", 16]))
        onnx.save(model, path)
        raw["files"] = [f | digest_file(path.parent, f["path"]).model_dump(mode="json") for f in raw["files"]]
        spec = {"name": "mixed", "dtype": "f32", "shape": ["B", "Q", "mixed:16"], "role": "debug"}
        raw["graphs"]["model"]["outputs"].append(spec)

    engine = changed(gpu_engine[0], tmp_path / "engine", edit)
    manifest = load_manifest(engine)
    found: dict[bool, list[np.ndarray]] = {}
    for taps in (False, True):
        backend = tensorrt.TensorRtBackend(engine, manifest)
        backend.allocate_caches(4)
        found[taps] = []
        for start, length in ((0, 20), *((20 + i, 1) for i in range(4))):
            where = np.broadcast_to(np.arange(start, start + length), (3, length))
            ids = np.random.default_rng(start).integers(3, 30, (3, length))
            rows = np.arange(3)[:, None]
            slots = where + 64 * (1 + rows)
            step = StepInputs(ids, where, slots, (1 + rows).astype(np.int32), np.arange(3) * length)
            outputs = backend.run(step, outputs=["logits", *(["mixed"] if taps else [])])
            found[taps].append(outputs.fetch("logits"))
            if taps:
                assert outputs.fetch("mixed").shape == (3, length, 16) and outputs.fetch("mixed").any()
        names = [spec.name for spec in manifest.graphs["model"].with_role("cache")]
        found[taps] += [backend.cache(name)[64:] for name in names]  # block 0 is scrap
        assert device.launches == 2, "captured the second time it comes, and never while watched"
        backend.close()
    assert len(found[True]) > 5 and all(np.array_equal(a, b) for a, b in zip(found[False], found[True], strict=True))


@pytest.mark.parametrize(
    ("side", "name", "shape", "words"),
    [
        ("outputs", "hidden", ["B", "Q", 17], "hidden has the shape [-1, -1, 16] in the plan and ['B', 'Q', 17] in"),
        ("inputs", "input_ids", ["B"], "input_ids has the shape [-1, -1] in the plan and ['B'] in the manifest"),
        ("inputs", "head", [16, 321], "head of graph model is f32 [16, 321] in the manifest and f32 [16, 320]"),
    ],
)
def test_shapes_of_a_manifest_are_held_against_the_plan_and_the_recipes(
    side: str, name: str, shape: list, words: str, gpu_engine, device: FakeDevice, tmp_path: Path
) -> None:
    def edit(raw: dict[str, Any]) -> None:
        specs = raw["graphs"]["model"][side]
        next(spec for spec in specs if spec["name"] == name)["shape"] = shape

    with pytest.raises(EngineError, match=re.escape(words)):
        LLM(changed(gpu_engine[0], tmp_path / "engine", edit), num_blocks=9)


def test_profiles_of_a_manifest_are_those_of_the_plan(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    bounds = [[1, 1], [1, 1], [8, 4]]
    edit = lambda raw: raw.update(profiles={"decode": {"model": {"input_ids": bounds}}})  # noqa: E731
    engine = changed(gpu_engine[0], tmp_path / "engine", edit)
    device.bounds = [{"input_ids": ((1, 1), (1, 1), (8, 1))}]
    with pytest.raises(EngineError, match=r"profile decode takes input_ids of .* the manifest says .*\(8, 4\)"):
        LLM(engine, num_blocks=9)
    device.bounds = [{}, {}]
    with pytest.raises(EngineError, match="has 2 profiles, the manifest 1"):
        LLM(engine, num_blocks=9)


def test_halves_of_a_step_hold_all_of_it() -> None:
    rng = np.random.default_rng(3)
    whole = StepInputs(
        rng.integers(0, 9, (5, 3)),
        rng.integers(0, 9, (5, 3)),
        rng.integers(0, 9, (5, 3)),
        rng.integers(0, 9, (5, 2)).astype(np.int32),
        np.array([14, 0, 7, 2]),
        rng.standard_normal((5, 3, 4)).astype(np.float32),
    )
    tokens = whole.input_ids.reshape(-1)
    seen = np.full(4, -1)
    rows = 0
    for part, wanted in halves(whole):
        seen[wanted] = part.input_ids.reshape(-1)[part.logits_index[: len(wanted)]]
        assert part.hidden_in is not None and whole.hidden_in is not None
        assert (part.hidden_in == whole.hidden_in[rows : rows + len(part.hidden_in)]).all()
        rows += len(part.input_ids)
    assert rows == 5 and (seen == tokens[whole.logits_index]).all()
    upper = halves(replace(whole, logits_index=np.array([14])))[0]
    assert len(upper[1]) == 0 and list(upper[0].logits_index) == [0], "a step always asks for a row"


def test_weights_larger_than_a_buffer_go_in_slices(gpu_engine, device: FakeDevice, toy) -> None:
    checkpoint = Checkpoint.open(gpu_engine[1])
    recipes = load_bindings(gpu_engine[0])
    told: list[LoadProgress] = []
    weights = DeviceWeights(
        gpu_engine[0], recipes, device, lambda: checkpoint, progress=told.append, staging_bytes=1000
    )
    places = weights.load("model", ["embedding", "head"])
    assert (device.view(places["embedding"], toy.embedding.shape, np.float32) == toy.embedding).all()
    assert (device.view(places["head"], toy.head.shape, np.float32) == toy.head).all()
    assert len(device.staged) == 2, "two buffers whatever the size"
    assert max(len(one) for one in device.staged) < 4096
    assert told[-1].done_bytes == told[-1].total_bytes == toy.embedding.nbytes + toy.head.nbytes
    assert [one.done_bytes for one in told] == sorted(one.done_bytes for one in told)
    assert weights.load("mtp", ["embedding"]) == {"embedding": places["embedding"]}
    with pytest.raises(EngineError, match="says nothing of rope_cos of graph model"):
        weights.load("model", ["rope_cos"])
    weights.close()
    assert not device.memory


def test_another_checkpoint_is_refused(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"head.weight": np.zeros((16, 320), np.float32)})
    index = {"weight_map": {"head.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the engine .* was built for"):
        LLM(gpu_engine[0], num_blocks=9, checkpoint=tmp_path)


def test_an_engine_that_does_not_fit_is_refused_before_its_cache_is_sized(
    gpu_engine, device: FakeDevice, tmp_path: Path
) -> None:
    audit = replace(audit_of({"total": 9 << 30, "usable": 1 << 30}), oversize=True).model_dump(mode="json")
    engine = changed(gpu_engine[0], tmp_path / "engine", lambda raw: raw.update(audit=audit))
    run = CliRunner().invoke(main, ["run", str(engine), "--prompt", "the cat"])
    assert run.exit_code == 2 and "audit.oversize is true: it needs 9.0 GiB and fake has 1.0 GiB" in run.stderr


def test_run_takes_weights_from_another_place(
    gpu_engine, toy_engine: Path, device: FakeDevice, toy, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(gpu_engine[1], moved)
    engine = changed(gpu_engine[0], tmp_path / "engine", lambda raw: raw["weights"].update(path="/gone"))
    args = ["run", str(engine), "--prompt", "the cat", "--greedy", "--max-tokens", "4", "--json"]
    lost = CliRunner().invoke(main, args)
    assert lost.exit_code == 2 and "/gone: does not exist" in lost.stderr
    assert "was built with its weights there: pass --checkpoint" in lost.stderr
    found = CliRunner().invoke(main, [*args, "--checkpoint", str(moved)])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["token_ids"] == toy.greedy(said["prompt_token_ids"], 4)
    own = CliRunner().invoke(main, ["run", str(toy_engine), *args[2:], "--checkpoint", str(moved)])
    assert own.exit_code == 2 and "--checkpoint is for engines without weights" in own.stderr


@pytest.mark.parametrize("command", ["bench", "dump"])
def test_bench_and_dump_take_weights_from_another_place(
    gpu_engine, toy_engine: Path, device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    versions = SimpleNamespace(version=lambda package: "0")  # a dump names that of the library
    monkeypatch.setattr("seekforge.runtime.dump.metadata", versions)
    moved = tmp_path / "moved"
    shutil.copytree(gpu_engine[1], moved)

    def edit(raw: dict[str, Any]) -> None:
        raw["weights"]["path"] = "/gone"
        raw["config"] |= {"index_topk": 64, "num_hidden_layers": 1}  # what a dump reads of it

    engine = changed(gpu_engine[0], tmp_path / "engine", edit)
    few = {
        "bench": ["--concurrency", "1", "--contexts", "4", "--max-tokens", "3", "--host-batch-size", "1", "--json"],
        "dump": [str(tmp_path / "dump"), "--contexts", "4", "--modes", "whole", "--quiet"],
    }[command]
    lost = CliRunner().invoke(main, [command, str(engine), *few])
    assert lost.exit_code == 2 and "/gone" in lost.stderr
    assert not (tmp_path / "dump").exists()
    found = CliRunner().invoke(main, [command, str(engine), *few, "--checkpoint", str(moved)])
    assert found.exit_code == 0, found.output
    own = CliRunner().invoke(main, [command, str(toy_engine), *few, "--checkpoint", str(moved)])
    assert own.exit_code == 2 and "--checkpoint is for engines without weights" in own.stderr


def test_no_gpu_memory_is_one_line(gpu_engine, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = device.allocate

    def tight(num_bytes: int) -> int:
        if num_bytes > 2_000_000:
            raise MemoryError
        return allocate(num_bytes)

    monkeypatch.setattr(device, "allocate", tight)
    with pytest.raises(EngineError, match=r"the cache needs .* bytes, which are not free; lower num_blocks"):
        LLM(gpu_engine[0], num_blocks=400)


@pytest.mark.parametrize(("value", "most", "power"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 8), (5, 6, 6), (8, 8, 8)])
def test_buckets_are_powers_of_two_up_to_a_bound(value: int, most: int, power: int) -> None:
    assert next_power_of_two(value, most) == power


def test_a_padded_step_writes_nothing_new() -> None:
    inputs = StepInputs(
        np.ones((3, 2), np.int64),
        np.ones((3, 2), np.int64),
        np.arange(6).reshape(3, 2) + 64,
        np.ones((3, 3), np.int32),
        np.arange(6),
        np.ones((3, 2, 16), np.float32),
    )
    wide = padded(inputs, max_batch_size=8, max_blocks=16)
    assert wide.input_ids.shape == (4, 2) and wide.block_table.shape == (4, 4) and len(wide.logits_index) == 8
    assert (wide.slot_mapping[3] == -1).all() and (wide.slot_mapping[:3] == inputs.slot_mapping).all()
    assert not wide.block_table[3].any() and not wide.block_table[:, 3].any()
    assert wide.hidden_in is not None and wide.hidden_in.shape == (4, 2, 16)


def test_the_backend_imports_no_gpu_library() -> None:
    script = (
        "import sys\nimport seekforge.runtime.backends.tensorrt.backend\n"
        "print([m for m in ('tensorrt', 'tensorrt_rtx', 'cuda', 'torch', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _load_all(engine: Path, checkpoint: Path) -> None:
    """Load an engine as a start with drafts does: every graph and all of its weights."""
    opened = Engine.open(engine)
    with contextlib.closing(opened.open_backend(checkpoint=checkpoint)) as backend:
        assert isinstance(backend, tensorrt.TensorRtBackend)
        backend._open("mtp")


def test_a_flipped_bit_anywhere_in_the_weights_is_noticed(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    """Of every tensor while it streams, of the header and its length, and of the index; and the place is named."""
    engine, weights = gpu_engine
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(weights, checkpoint)
    _load_all(engine, checkpoint)
    chance = random.Random(0)
    shard, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    recipes = load_bindings(engine)
    weights_of = {name: graph_io.with_role("weight") for name, graph_io in load_manifest(engine).graphs.items()}
    read = {name for graph, specs in weights_of.items() for s in specs for name in tensors_of(recipes[graph][s.name])}
    with Checkpoint.open(checkpoint) as opened:
        places = [(shard, info.begin, info.end, f"{name!r}: its bytes") for name in read if (info := opened.info(name))]
    places += [(shard, 0, 8, shard.name), (shard, 8, 8 + length, str(checkpoint))]
    places += [(index, 0, index.stat().st_size, str(checkpoint))]
    for path, begin, end, says in places:
        good = path.read_bytes()
        for _ in range(6):
            bad, bit = bytearray(good), chance.randrange(8 * begin, 8 * end)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises((CheckpointError, EngineError), match=re.escape(says)):
                _load_all(engine, checkpoint)
        path.write_bytes(good)
    _load_all(engine, checkpoint)


def test_a_flipped_bit_in_any_file_of_an_engine_is_noticed(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(gpu_engine[0], engine)
    files = [path for path in sorted(engine.rglob("*")) if path.is_file()]
    listed = {file.path for file in load_manifest(engine).files} | {"manifest.json"}
    assert {str(path.relative_to(engine)) for path in files} == listed
    chance = random.Random(1)
    for path in files:
        good = path.read_bytes()
        for _ in range(6):
            bad, bit = bytearray(good), chance.randrange(8 * len(good))
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(EngineError, match=re.escape(path.name)):
                Engine.open(engine)
        path.write_bytes(good)
    Engine.open(engine)
