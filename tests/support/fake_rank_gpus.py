"""Pretended GPUs for an engine of several ranks: one for each, which a thread drives as the process of a rank would.

The engine is one of a CPU whose pieces between two sums are put together again: a plan runs the pieces of a pipeline
stage one after the other, and adds up between them as NCCL would inside of a plan.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from tests.support.fake_gpu import FakeDevice, FakePlan
from tests.support.ort_session import open_session

from seekforge.common.errors import EngineError
from seekforge.common.files import write_json
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine.manifest import Manifest, digest_file, load_manifest, manifest_digest
from seekforge.formats.engine.ranks import LOCAL, PARTIAL, SUM, joined, sum_name
from seekforge.formats.program import GraphIO, TensorSpec, load_bindings, role_of, save_bindings
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.formats.weight_recipes import Recipe
from seekforge.runtime.backends.base import GraphMetrics
from seekforge.runtime.backends.ranks.device_rank import DeviceRank
from seekforge.runtime.backends.ranks.message import Message
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory
from seekforge.runtime.backends.ranks.worker import message_of, take_calls
from seekforge.runtime.backends.tensorrt.waiting import await_stream

_INSIDE, _BETWEEN = (PARTIAL, SUM, LOCAL), ("intermediate.", "intermediate_out.")
#: What a GPU has room for, by the account of its stage.
_ACCOUNT = {"weights": 0, "scratch": 0, "activations": 0, "reserve": 0, "total": 1 << 20, "usable": 1 << 30}


def gpu_engine_of(engine: Path, checkpoint: Path, folder: Path) -> Path:
    """Return a CPU engine of several ranks as a GPU's, whose weights are inputs and come from the checkpoint."""
    shutil.copytree(engine, folder, ignore=shutil.ignore_patterns("weights*.bin"))
    manifest, recipes = load_manifest(engine), load_bindings(engine)
    assert manifest.ranks is not None
    bindings: dict[str, dict[str, Recipe]] = {}
    stages: dict[str, tuple[GraphIO, ...]] = {}
    graphs: dict[str, GraphIO] = {}
    names: dict[str, tuple[tuple[str, ...], ...]] = {}
    for graph in manifest.graphs:
        made: list[tuple[str, ...]] = []
        ios: list[GraphIO] = []
        bindings[graph] = {}
        for stage in range(manifest.ranks.parallelism.pp):
            pieces = manifest.ranks.pieces_of(graph, manifest.plans(graph), stage)
            made.append((f"{graph}.s{stage}",) if pieces else ())
            if pieces:
                plan = folder / f"{graph}.s{stage}.plan"
                ios.append(_as_plan(folder, plan, pieces, recipes))
                for piece in pieces:
                    bindings[graph] |= recipes[Path(piece.file).stem]
        names[graph], stages[graph], graphs[graph] = tuple(made), tuple(ios), joined(ios)
    save_bindings(folder, bindings)
    with Checkpoint.open(checkpoint) as opened:
        weights = {"path": str(checkpoint), "index_digest": opened.index_digest()}
    raw = json.loads((folder / "manifest.json").read_text())
    ranks = manifest.ranks
    accounts = (_ACCOUNT,) * ranks.parallelism.pp
    raw |= {
        "target": {"name": "fake", "backend": "tensorrt", "sm": 90, "sms": [90]},
        "graphs": {name: io.model_dump(mode="json") for name, io in graphs.items()},
        "stages": {name: [io.model_dump(mode="json") for io in of_graph] for name, of_graph in stages.items()},
        "ranks": ranks.model_copy(update={"pieces": names, "stage_bytes": accounts}).model_dump(mode="json"),
        "weights": weights,
        "runtime_versions": {},
    }
    plans = [io.file for of_graph in stages.values() for io in of_graph]
    raw["files"] = [digest_file(folder, name).model_dump(mode="json") for name in ("bindings.json", *plans)]
    write_json(folder / "manifest.json", raw | {"digest": manifest_digest(raw)})
    return folder


def _as_plan(
    folder: Path, plan: Path, pieces: Sequence[GraphIO], recipes: Mapping[str, Mapping[str, Recipe]]
) -> GraphIO:
    """Write a plan that runs pieces, whose constants become inputs, and describe it."""
    write_json(plan, {"pieces": [piece.file for piece in pieces]})
    given: dict[str, TensorSpec] = {}
    for piece in pieces:
        model = onnx.load(folder / piece.file, load_external_data=False)
        for constant in list(model.graph.initializer):
            recipe = recipes[Path(piece.file).stem].get(constant.name)
            if recipe is None:
                continue
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(constant.name, constant.data_type, list(constant.dims))
            )
            model.graph.initializer.remove(constant)
            given[constant.name] = TensorSpec(
                name=constant.name,
                dtype=recipe.dtype,
                shape=tuple(recipe.shape),
                role=role_of(constant.name) or "weight",
            )
        onnx.save(model, folder / piece.file)
    whole = joined(pieces)
    ends: dict[str, dict[str, TensorSpec]] = {"inputs": {}, "outputs": {}}
    for piece in pieces:
        for side, specs in (("inputs", piece.inputs), ("outputs", piece.outputs)):
            ends[side] |= {
                spec.name: spec for spec in specs if spec.name.startswith(("intermediate.", "intermediate_out."))
            }
    inputs = (*whole.inputs, *(one for name, one in ends["inputs"].items() if name not in ends["outputs"]))
    return whole.model_copy(
        update={
            "file": plan.name,
            "sha256": "",
            "inputs": (*inputs, *given.values()),
            "outputs": (*whole.outputs, *ends["outputs"].values()),
        }
    )


class _PieceSession:
    """The pieces of a plan, as one session of ONNX Runtime."""

    def __init__(self, path: Path, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        self._add_up = add_up
        names = json.loads(path.read_text())["pieces"]
        self._sessions = [open_session(path.parent / name) for name in names]

    def get_inputs(self) -> list[Any]:
        made = {one.name for session in self._sessions for one in session.get_outputs()}
        found = {one.name: one for session in self._sessions for one in session.get_inputs()}
        return [one for name, one in found.items() if name not in made and not name.startswith(_INSIDE)]

    def get_outputs(self) -> list[Any]:
        found = {one.name: one for session in self._sessions for one in session.get_outputs()}
        return [one for name, one in found.items() if not name.startswith(_INSIDE)]

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        values = dict(feeds)
        for session in self._sessions:
            outputs = [one.name for one in session.get_outputs()]
            results = session.run(outputs, {one.name: values[one.name] for one in session.get_inputs()})
            values |= dict(zip(outputs, map(np.asarray, results), strict=True))
            values |= {sum_name(one): self._add_up(values[one]) for one in outputs if one.startswith(PARTIAL)}
        return [values[name] for name in names]


class ThreadMemory(SharedMemory):
    """Ranks that are threads of one process: who waits sleeps, since a look at a counter holds up who works."""

    def wait(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._alarm()
            time.sleep(1e-4)


class FakeGroup:
    """Ranks that add up over a memory that they share."""

    def __init__(self, add_up: Callable[[np.ndarray], np.ndarray], size: int) -> None:
        self.add_up, self._size = add_up, size
        self.communicator, self.agreed, self.is_aborted, self.closed = object(), 0, False, False

    def agree(self, fine: bool) -> bool:
        self.agreed += 1
        return int(self.add_up(np.array([int(fine)], np.int64))[0]) == self._size

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.closed = True


class RankDevice(FakeDevice):
    """The pretended GPU of one rank.

    Attributes:
        is_done: what its stream says when it is asked.
    """

    def __init__(self, group: FakeGroup | None) -> None:
        super().__init__()
        self.group = group
        self.is_done: Callable[[], bool] = lambda: True

    def synchronize(self) -> None:
        await_stream(self.is_done, self.group)
        super().synchronize()

    def download(self, array: np.ndarray, address: int) -> None:
        self.synchronize()
        super().download(array, address)

    def open_plan(self, path: Path) -> FakePlan:
        self.opened.append(path.name)
        plan = FakePlan.__new__(FakePlan)
        plan.device, plan.contexts = self, {}
        plan.session = _PieceSession(path, lambda part: part if self.group is None else self.group.add_up(part))  # pyright: ignore
        self.plans.append(plan)
        return plan


class ThreadRanks:
    """A backend whose other ranks are threads; each has a pretended GPU.

    Attributes:
        devices: the GPUs by rank.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        edit: Callable[[int, RankDevice], None] | None = None,
        on_fault: Callable[[int, BaseException], None] = lambda number, error: None,
    ) -> None:
        assert manifest.ranks is not None
        self._parallelism = parallelism = manifest.ranks.parallelism
        memory = Memory(parallelism)
        self.devices: dict[int, RankDevice] = {}
        self.faults: list[BaseException] = []
        self._alarm = lambda: self._raise()
        shared = [ThreadMemory(memory, number, self._alarm) for number in range(parallelism.num_ranks)]
        self._collectives = shared[0]

        def open_rank(number: int) -> DeviceRank:
            def open_device(folder: Path, manifest: Manifest, number: int, join: Any) -> RankDevice:
                self.devices[number] = RankDevice(None if join is None else join(lambda: None))
                if edit is not None:
                    edit(number, self.devices[number])
                return self.devices[number]

            def make_group(unique: bytes, rank: int, size: int, add_up: Any) -> FakeGroup:
                place = parallelism.coordinates(number)
                assert (unique, rank, size) == (b"stage %d" % place.pp_rank, place.tp_rank, parallelism.tp)
                return FakeGroup(add_up, size)

            groups = [b"stage %d" % stage for stage in range(parallelism.pp)]
            return DeviceRank(
                folder, manifest, number, shared[number], groups=groups, open_device=open_device, make_group=make_group
            )

        def work(number: int) -> None:
            try:
                rank = open_rank(number)
                take_calls(rank, shared[number], parallelism, number)
                rank.close()
            except BaseException as error:
                on_fault(number, error)
                self.faults.append(error)

        numbers = range(1, parallelism.num_ranks)
        self._threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in numbers]
        for thread in self._threads:
            thread.start()
        self._rank = open_rank(0)

    def _raise(self) -> None:
        if self.faults:
            raise EngineError(f"a rank failed: {self.faults[0]!r}")

    def _call(self, message: Message) -> None:
        self._collectives.broadcast(message)

    def allocate_caches(self, num_blocks: int) -> None:
        self._call(Message({"call": "allocate_caches", "num_blocks": num_blocks}))
        self._rank.allocate_caches(num_blocks)

    def run(self, inputs: StepInputs, *, outputs: Collection[str], graph: str = MODEL, parts: int = 1) -> Any:
        names = sorted(outputs)
        self._call(message_of(inputs, names, graph, parts))
        return SimpleNamespace(fetch=self._rank.run(inputs, names, graph, parts).__getitem__)

    def cache(self, name: str) -> np.ndarray:
        self._call(Message({"call": "cache", "name": name}))
        values = [self._rank.cache(name)]
        for stage in range(1, self._parallelism.pp):
            sent = self._collectives.send(None, source=stage * self._parallelism.tp, target=0)
            values.append(sent.arrays.get("cache"))
        return next(value for value in values if value is not None)

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._rank.check_update(tensors)
        self._call(Message({"call": "update_weights"}, dict(tensors)))
        self._rank.update_weights(tensors)

    def graph_metrics(self) -> GraphMetrics:
        return self._rank.graph_metrics()

    def close(self) -> None:
        self._call(Message({"call": "close"}))
        self._rank.close()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads) and not self.faults, self.faults
