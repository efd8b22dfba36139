"""A pretended GPU for the TensorRT backend: its memory is bytes, and ONNX Runtime runs its plans, by TensorRT's rules.

Its contexts go dirty when shapes change, and refuse to be captured while they are; a graph works in the contexts that
it was captured in. It refuses on demand: captures, contexts, and the question whether they can be captured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from tests.support.ort_session import open_session

from seekforge.common.errors import EngineError
from seekforge.common.files import write_json
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_writer import write_shard
from seekforge.formats.engine.manifest import digest_file, load_manifest, manifest_digest
from seekforge.formats.program import save_bindings
from seekforge.formats.weight_digests import write_weight_digests
from seekforge.formats.weight_recipes import Recipe
from seekforge.runtime.backends.tensorrt.device import Call

#: Values that a fake plan shows as debug tensors, where its graph gives them.
DEBUG = ("mixed",)


class FakeContext:
    """The internal state of an execution context.

    `shapes` are those that it was told last, which a captured graph reads when it runs; `dirty` until a run with them
    that is not captured has updated it.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dirty = True
        self.alive = True


class FakePlan:
    """Reads its inputs from fake memory by address and shape, runs the graph, and writes its outputs there."""

    def __init__(self, device: FakeDevice, path: Path) -> None:
        self.device = device
        self.session = open_session(path)
        self.contexts: dict[tuple[int, int, bool], FakeContext] = {}
        device.plans.append(self)

    def names(self) -> list[str]:
        names = [value.name for value in (*self.session.get_inputs(), *self.session.get_outputs())]
        return [name for name in names if name not in DEBUG]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        return {v.name: tuple(size if isinstance(size, int) else -1 for size in v.shape) for v in values}

    def bounds(self) -> list[dict]:
        return self.device.bounds

    def aliases(self) -> dict[str, str]:
        return self.device.aliases

    def enqueue(self, call: Call) -> None:
        assert call.watched <= set(DEBUG)
        self.device.enqueues += 1
        self.device.profiles.append(call.profile)
        self.device.enqueued.append((call.context, call.specialized, self.device.recording is not None))
        key = call.profile, call.context, call.specialized
        if key not in self.contexts:
            if call.context and self.device.most_contexts <= sum(len(plan.contexts) for plan in self.device.plans):
                raise MemoryError("no memory for an execution context")
            self.contexts[key] = FakeContext()
        context = self.contexts[key]
        call = Call(dict(call.addresses), dict(call.shapes), call.profile, watched=call.watched, seen=call.seen)
        if context.shapes != call.shapes:
            context.shapes, context.dirty = call.shapes, True
        if self.device.recording is None:
            context.dirty = False
            self.run(context, call)
        elif context.dirty:
            raise EngineError("shapes changed: the first enqueue with them must not be captured")
        else:
            assert key[2], "kernels that may be swapped are in no graph"
            self.device.recording.append(lambda: self.run(context, call))

    def is_stream_capturable(self, call: Call) -> bool:
        assert not self.contexts[call.profile, call.context, call.specialized].dirty, "queried before its first run"
        self.device.capture_queries += 1
        return self.device.capturable

    def release(self, context: int) -> None:
        for key in [key for key in self.contexts if key[1] == context]:
            self.contexts.pop(key).alive = False

    def run(self, context: FakeContext, call: Call) -> None:
        assert context.alive, "the context of a graph was given back before the graph"
        dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
        shapes = context.shapes
        feeds = {
            value.name: self.device.view(call.addresses[value.name], shapes[value.name], dtypes[value.type]).copy()
            for value in self.session.get_inputs()
        }
        names = [value.name for value in self.session.get_outputs()]
        for name, value in zip(names, map(np.asarray, self.session.run(names, feeds)), strict=True):
            if name in DEBUG:  # no address: it is handed over while the step runs
                if name in call.watched:
                    call.seen(name, value)
                continue
            self.device.view(call.addresses[name], value.shape, value.dtype)[...] = value


class FakeDevice:
    """Memory as byte arrays at made-up addresses; a graph is a list of calls.

    Attributes:
        capturable: what contexts say of themselves.
        capture_fault: raised at the end of every capture, if any.
        most_contexts: there is no memory for more of captured graphs.
        aliases: the aliases that plans tell of.
        enqueued: (context, specialized, whether a capture went on) of every run.
    """

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.next = 4096
        self.graphs: list[list] = []
        self.recording: list | None = None
        self.profiles: list[int] = []
        self.opened: list[str] = []
        self.under_way: list[tuple[int, np.ndarray]] = []
        self.staged: list[np.ndarray] = []
        self.plans: list[FakePlan] = []
        self.enqueued: list[tuple[int, bool, bool]] = []
        self.aliases: dict[str, str] = {}
        self.bounds: list[dict] = []  # of the profiles of every plan
        self.capturable = True
        self.capture_fault: Exception | None = None
        self.most_contexts = 10**6
        self.enqueues = self.launches = self.uploaded_bytes = self.capture_queries = self.captures = 0
        self.closed = False
        self.group: Any = None

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

    def staging(self, num_bytes: int) -> np.ndarray:
        self.staged.append(np.full(num_bytes, 0xCD, np.uint8))
        return self.staged[-1]

    def upload_staged(self, address: int, array: np.ndarray) -> None:
        self.under_way.append((address, array))  # copied as late as CUDA may

    def synchronize(self) -> None:
        for address, array in self.under_way:
            block = max(start for start in self.memory if start <= address)
            self.uploaded_bytes += array.nbytes
            into = self.memory[block][address - block :][: array.nbytes]
            into[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.under_way.clear()

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = self.view(address, array.shape, array.dtype)

    def open_plan(self, path: Path) -> FakePlan:
        self.opened.append(path.name)
        return FakePlan(self, path)

    def capture(self, work) -> int:
        self.captures += 1
        self.recording = []
        try:
            work()
            if self.capture_fault is not None:
                raise self.capture_fault
            self.graphs.append(self.recording)
        finally:
            self.recording = None
        return len(self.graphs) - 1

    def launch(self, graph: int) -> None:
        self.launches += 1
        assert self.graphs[graph], "a graph that was given back"
        for call in self.graphs[graph]:
            call()

    def forget(self, graph: int) -> None:
        self.graphs[graph] = []

    def close(self) -> None:
        assert not any(self.graphs), "every captured graph is given back"
        assert {key[1] for plan in self.plans for key in plan.contexts} <= {0}, "and its contexts"
        self.closed = True


def make_gpu_engine(toy_engine: Path, root: Path) -> tuple[Path, Path]:
    """Write the toy engine as a GPU's, whose weights are inputs, and a checkpoint that has them; return both."""
    engine, checkpoint = root / "engine", root / "checkpoint"
    shutil.copytree(toy_engine, engine)
    checkpoint.mkdir()
    raw = json.loads((engine / "manifest.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    bindings: dict[str, dict[str, Recipe]] = {}
    for graph, graph_io in raw["graphs"].items():
        model = onnx.load(engine / graph_io["file"])
        bindings[graph] = {}
        for constant in list(model.graph.initializer):
            value = numpy_helper.to_array(constant)
            tensors[f"{constant.name}.weight"] = value
            bindings[graph][constant.name] = Recipe("take", value.shape, "f32", tensor=f"{constant.name}.weight")
            info = onnx.helper.make_tensor_value_info(constant.name, constant.data_type, value.shape)
            model.graph.input.append(info)
            graph_io["inputs"].append(
                {"name": constant.name, "dtype": "f32", "shape": list(value.shape), "role": "weight"}
            )
        del model.graph.initializer[:]
        onnx.save(model, engine / graph_io["file"])
        (engine / f"{graph_io['file']}.data").unlink()
        for spec in (*graph_io["inputs"], *graph_io["outputs"]):
            if spec["name"] in ("input_ids", "hidden_in"):
                spec["role"] = "token"
            elif spec["name"] in ("positions", "slot_mapping", "block_table", "logits_index"):
                spec["role"] = "bookkeeping"
    for name, factor in (("double", 2.0), ("half", 0.5)):  # read by an engine whose layers are alike
        tensors[name] = np.full(16, factor, np.float32)
        bindings["model"][f"layers.{name}"] = Recipe("take", (16,), "f32", tensor=name)
    write_shard(checkpoint / "model.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_bindings(engine, bindings)
    with Checkpoint.open(checkpoint) as opened:
        raw["weights"] = {"path": str(checkpoint), "index_digest": opened.index_digest()}
        write_weight_digests(engine, opened, tensors, lambda done, total: None)
    raw["target"] = {"name": "fake", "backend": "tensorrt", "sm": 90}
    raw["runtime_versions"] = {}
    files = ["model.onnx", "mtp.onnx", "tokenizer.json", "bindings.json", "weight_digests.json"]
    raw["files"] = [digest_file(engine, name).model_dump(mode="json") for name in files]
    write_json(engine / "manifest.json", raw | {"digest": manifest_digest(raw)})
    assert load_manifest(engine).weights is not None
    return engine, checkpoint


def changed(engine: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of an engine with another manifest."""
    shutil.copytree(engine, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    edit(raw)
    write_json(folder / "manifest.json", raw | {"digest": manifest_digest(raw)})
    return folder


def in_two_plans(engine: Path, folder: Path) -> Path:
    """Return the engine with its model cut into two plans, where the mixed values are handed on."""

    def edit(raw: dict[str, Any]) -> None:
        model = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx"))
        handed = {"name": "intermediate.0", "dtype": "f32", "shape": ["B", "Q", 16], "role": "intermediate"}
        graph_io = raw["graphs"]["model"]
        stages = []
        for number in (0, 1):
            outputs = [one for one in graph_io["outputs"] if one["name"].endswith(".0") == (number == 0)]
            names = [one["name"] for one in outputs]
            if number == 0:
                part = onnx.utils.Extractor(model).extract_model([i.name for i in model.graph.input], [*names, "mixed"])
            else:
                part = onnx.utils.Extractor(model).extract_model(["mixed", "logits_index", "head"], names)
            rename = {"mixed": "intermediate_out.0" if number == 0 else "intermediate.0"}
            for node in part.graph.node:
                node.input[:] = [rename.get(name, name) for name in node.input]
                node.output[:] = [rename.get(name, name) for name in node.output]
            for value in (*part.graph.input, *part.graph.output):
                value.name = rename.get(value.name, value.name)
            read = {name for node in part.graph.node for name in node.input}
            for value in [value for value in part.graph.input if value.name not in read]:
                part.graph.input.remove(value)
            file = f"model.{number}.onnx"
            onnx.save(part, folder / file)
            inputs = [one for one in (*graph_io["inputs"], handed) if one["name"] in {v.name for v in part.graph.input}]
            outputs += [handed | {"name": "intermediate_out.0"}] if number == 0 else []
            aliases = graph_io["aliases"] if number == 0 else {}
            stages.append({"file": file, "sha256": "", "inputs": inputs, "outputs": outputs, "aliases": aliases})
            raw["files"].append(digest_file(folder, file).model_dump(mode="json"))
        raw["stages"] = {"model": stages}
        graph_io["file"] = stages[0]["file"]

    return changed(engine, folder, edit)


def with_layers_alike(engine: Path, folder: Path) -> Path:
    """Return the engine in four stages: between the two of `in_two_plans` one plan runs twice, to double and to halve.

    It gives the negative of its result as a tap, and adds the sum of its result to each row of a cache of its own.

    Each value that is handed on lies in another place than the one before, and the places are used in turns.
    """
    in_two_plans(engine, folder)
    nodes = [
        onnx.helper.make_node("Mul", ["intermediate.0", "layers.double"], ["intermediate_out.1"]),
        onnx.helper.make_node("Neg", ["intermediate_out.1"], ["chosen.0"]),
        onnx.helper.make_node("ReduceSum", ["intermediate_out.1", "tokens"], ["sum"], keepdims=0),
        onnx.helper.make_node("Add", ["kept.0", "sum"], ["kept_out.0"]),
    ]
    value = onnx.helper.make_tensor_value_info
    shape = ["B", "Q", 16]
    slots = ["NS", 16]
    inputs = [value("intermediate.0", 1, shape), value("layers.double", 1, [16]), value("kept.0", 1, slots)]
    outputs = [value("intermediate_out.1", 1, shape), value("chosen.0", 1, shape), value("kept_out.0", 1, slots)]
    axes = [numpy_helper.from_array(np.array([0, 1]), "tokens")]
    graph = onnx.helper.make_graph(nodes, "scale", inputs, outputs, initializer=axes)
    model = onnx.helper.make_model(graph, ir_version=10)
    onnx.save(model, folder / "model.scale.onnx")
    raw = json.loads((folder / "manifest.json").read_text())

    def stage(gain: str, taken: int, made: int) -> dict[str, Any]:
        handed = {"dtype": "f32", "shape": shape, "role": "intermediate"}
        weight = {"name": f"layers.{gain}", "dtype": "f32", "shape": [16], "role": "weight"}
        raw["graphs"]["model"]["inputs"].append(weight)
        inputs = [handed | {"name": f"intermediate.{taken}"}, weight]
        tap = handed | {"name": f"chosen.{taken}", "role": "tap"}
        kept = {"name": f"kept.{taken}", "dtype": "f32", "shape": slots, "role": "cache"}
        written = kept | {"name": f"kept_out.{taken}"}
        inputs.append(kept)
        outputs = [handed | {"name": f"intermediate_out.{made}"}, tap, written]
        graph_io = raw["graphs"]["model"]
        graph_io["inputs"].append(kept)
        graph_io["outputs"] += [tap, written]
        aliases = {written["name"]: kept["name"]}
        graph_io["aliases"] |= aliases
        return {"file": "model.scale.onnx", "sha256": "", "inputs": inputs, "outputs": outputs, "aliases": aliases}

    first, last = raw["stages"]["model"]
    raw["stages"]["model"] = [first, stage("double", 0, 1), stage("half", 1, 0), last]
    raw["files"].append(digest_file(folder, "model.scale.onnx").model_dump(mode="json"))
    write_json(folder / "manifest.json", raw | {"digest": manifest_digest(raw)})
    return folder
