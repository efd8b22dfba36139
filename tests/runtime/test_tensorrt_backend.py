"""The TensorRT backend on a fake device, whose memory is bytes and whose plans are run by ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from seekforge.plugins.errors import EngineError
from seekforge.plugins.formats.bindings import Recipe
from seekforge.plugins.formats.files import write_json
from seekforge.plugins.formats.manifest import digest_file, load_manifest
from seekforge.plugins.formats.program import save_bindings
from seekforge.plugins.formats.safetensors import Checkpoint, write_shard
from seekforge.runtime import LLM, SamplingParams
from seekforge.runtime.backends import tensorrt
from seekforge.runtime.backends.base import StepInputs
from seekforge.runtime.backends.tensorrt import next_power_of_two, padded

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


class FakePlan:
    """Reads its inputs from fake memory by address and shape, runs the graph, and writes its outputs there."""

    def __init__(self, device: FakeDevice, path: Path) -> None:
        self.device = device
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def names(self) -> list[str]:
        return [value.name for value in (*self.session.get_inputs(), *self.session.get_outputs())]

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def enqueue(self) -> None:
        self.device.enqueues += 1
        self.run(dict(self.shapes), dict(self.addresses))

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        if self.device.recording is not None:
            self.device.recording.append(lambda: self.run(shapes, addresses))
            return
        dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
        feeds = {
            value.name: self.device.view(addresses[value.name], shapes[value.name], dtypes[value.type]).copy()
            for value in self.session.get_inputs()
        }
        names = [value.name for value in self.session.get_outputs()]
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            self.device.view(addresses[name], value.shape, value.dtype)[...] = value


class FakeDevice:
    """Memory as byte arrays at made-up addresses; a graph is a list of calls."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.next = 4096
        self.graphs: list[list] = []
        self.recording: list | None = None
        self.enqueues = self.launches = self.uploaded_bytes = 0
        self.closed = False

    def allocate(self, num_bytes: int) -> int:
        address, self.next = self.next, self.next + num_bytes + 4096
        self.memory[address] = np.full(num_bytes, 0xAB, np.uint8)  # rubbish
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def zero(self, address: int, num_bytes: int) -> None:
        self.memory[address][:num_bytes] = 0

    def view(self, address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address][:count].view(dtype).reshape(shape)

    def upload(self, address: int, array: np.ndarray) -> None:
        self.uploaded_bytes += array.nbytes
        self.memory[address][: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = self.view(address, array.shape, array.dtype)

    def open_plan(self, path: Path) -> FakePlan:
        return FakePlan(self, path)

    def capture(self, work) -> int:
        self.recording = []
        work()
        self.graphs.append(self.recording)
        self.recording = None
        return len(self.graphs) - 1

    def launch(self, graph: int) -> None:
        self.launches += 1
        for call in self.graphs[graph]:
            call()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def gpu_engine(toy_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The toy engine as a GPU's: weights are inputs, and a checkpoint that has them."""
    root = tmp_path_factory.mktemp("gpu")
    engine, checkpoint = root / "engine", root / "checkpoint"
    shutil.copytree(toy_engine, engine)
    checkpoint.mkdir()
    raw = json.loads((engine / "manifest.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    bindings: dict[str, dict[str, Recipe]] = {}
    for graph, face in raw["graphs"].items():
        model = onnx.load(engine / face["file"])
        bindings[graph] = {}
        for constant in list(model.graph.initializer):
            value = numpy_helper.to_array(constant)
            tensors[f"{constant.name}.weight"] = value
            bindings[graph][constant.name] = Recipe("take", value.shape, "f32", tensor=f"{constant.name}.weight")
            info = onnx.helper.make_tensor_value_info(constant.name, constant.data_type, value.shape)
            model.graph.input.append(info)
            face["inputs"].append({"name": constant.name, "dtype": "f32", "shape": list(value.shape), "role": "weight"})
        del model.graph.initializer[:]
        onnx.save(model, engine / face["file"])
        (engine / f"{face['file']}.data").unlink()
        for spec in (*face["inputs"], *face["outputs"]):
            if spec["name"] in ("input_ids", "hidden_in"):
                spec["role"] = "token"
            elif spec["name"] in ("positions", "slot_mapping", "block_table", "logits_index"):
                spec["role"] = "bookkeeping"
    write_shard(checkpoint / "model.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_bindings(engine, bindings)
    with Checkpoint.open(checkpoint) as opened:
        raw["weights"] = {"path": str(checkpoint), "index_digest": opened.index_digest()}
    raw["target"] = {"name": "fake", "backend": "tensorrt", "sm": 90}
    raw["runtime_versions"] = {}
    files = ["model.onnx", "mtp.onnx", "tokenizer.json", "bindings.json"]
    raw["files"] = [digest_file(engine, name).model_dump(mode="json") for name in files]
    write_json(engine / "manifest.json", raw)
    assert load_manifest(engine).weights is not None
    return engine, checkpoint


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(tensorrt, "_open_gpu", lambda folder, manifest: device)
    return device


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
    with LLM(gpu_engine[0], num_blocks=9, self_check=False) as llm:
        before = device.uploaded_bytes
        assert before == toy.embedding.nbytes + toy.head.nbytes
        llm._core.backend._open("mtp")
        assert device.uploaded_bytes == before
        first = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
        llm.update_weights({"head.weight": np.ascontiguousarray(toy.head[:, ::-1])})
        flipped = replace(toy, head=np.ascontiguousarray(toy.head[:, ::-1]))
        assert list(llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids) == flipped.greedy([5, 6, 7], 10)
        assert list(first) == toy.greedy([5, 6, 7], 10)


def test_another_checkpoint_is_refused(gpu_engine, device: FakeDevice, tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"head.weight": np.zeros((16, 320), np.float32)})
    index = {"weight_map": {"head.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="is not the checkpoint that"):
        LLM(gpu_engine[0], num_blocks=9, checkpoint=tmp_path)


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
        "import sys\nimport seekforge.runtime.backends.tensorrt\n"
        "print([m for m in ('tensorrt', 'tensorrt_rtx', 'cuda', 'torch', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
