"""One rank of a GPU engine: its plans, weights and caches on a GPU of its own, and its part of a step.

Tensor-parallel ranks add up inside of their plans, through NCCL (`tensorrt.nccl`). Between pipeline stages values go
over the host, by the calls of `Collectives` that CPU engines use too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from seekforge.formats.engine.manifest import Manifest
from seekforge.formats.program import load_bindings
from seekforge.formats.step_io import MODEL, StepInputs
from seekforge.runtime.backends.base import GraphMetrics, OnLoad
from seekforge.runtime.backends.ranks.collectives import Collectives
from seekforge.runtime.backends.ranks.micro_batches import join_parts, split_step
from seekforge.runtime.backends.ranks.nodes import local_number
from seekforge.runtime.backends.ranks.same_check import SameCheck
from seekforge.runtime.backends.ranks.stage_links import StageLinks, wanted_of
from seekforge.runtime.backends.tensorrt.backend import TensorRtBackend
from seekforge.runtime.backends.tensorrt.device import Device, Group, Join
from seekforge.runtime.backends.tensorrt.nccl import MEETING_S, HostSum, NcclGroup
from seekforge.runtime.backends.tensorrt.part import rank_part
from seekforge.runtime.backends.tensorrt.waiting import beside
from seekforge.runtime.backends.weights import changed_constants

#: Opens the GPU of a rank and, where it has a group, joins that.
OpenDevice = Callable[[Path, Manifest, int, Join | None], Device]


class DeviceRank:
    """An opened rank; see `rank.Rank`, which is that of a CPU engine.

    Args:
        folder, manifest: the engine.
        number: the rank.
        collectives: what it has of the others.
        groups: for each pipeline stage what its ranks find each other by (`nccl.unique_id`); none where tp is 1.
        checkpoint: where the weights are; None takes where they were at build.
        progress: called while weights are loaded.
        checked: compare what ranks choose, in every step.
        lost: raises when a rank is lost, while this one waits for all.
        open_device: opens its GPU.
        make_group: joins the ranks that add up with it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        number: int,
        collectives: Collectives,
        *,
        groups: Sequence[bytes] = (),
        checkpoint: Path | None = None,
        progress: OnLoad | None = None,
        checked: bool = False,
        lost: Callable[[], None] = lambda: None,
        open_device: OpenDevice | None = None,
        make_group: Callable[[bytes, int, int, HostSum], Group] = NcclGroup,
    ) -> None:
        assert manifest.ranks is not None
        parallelism = manifest.ranks.parallelism
        place = parallelism.coordinates(number)
        self._links = StageLinks(manifest, number, collectives)
        self._bindings = load_bindings(folder)
        self._part = rank_part(manifest, self._bindings, number, self._links)
        self._check = SameCheck(collectives, parallelism, number)
        self._choices = {
            graph: [spec.name for io in ios for spec in io.outputs if spec.role == "tap"]
            for graph, ios in self._part.plans.items()
            if checked
        }

        def join(make_current: Callable[[], None]) -> Group:
            def make() -> Group:
                make_current()
                return make_group(groups[place.pp_rank], place.tp_rank, parallelism.tp, collectives.sum)

            # until every rank has its GPU: one that has none says so, and nobody waits for it inside of NCCL
            collectives.sum(np.zeros(1, np.int64))
            words = f"NCCL: rank {number} and those that add up with it did not meet within {MEETING_S:.0f} s"
            return beside(make, MEETING_S, words, lost)

        self.device = (open_device or _open_gpu)(folder, manifest, number, join if parallelism.tp > 1 else None)
        self._backend = TensorRtBackend(
            folder, manifest, checkpoint=checkpoint, progress=progress, device=self.device, part=self._part
        )

    def allocate_caches(self, num_blocks: int) -> None:
        """Make zeroed caches of `num_blocks` blocks; earlier ones are given back."""
        self._backend.allocate_caches(num_blocks)

    def run(
        self, inputs: StepInputs, outputs: Collection[str], graph: str = MODEL, parts: int = 1
    ) -> dict[str, np.ndarray]:
        """Run this rank's part of a step; see `rank.Rank.run`."""
        results: dict[str, np.ndarray] = {}
        if graph in self._part.plans:
            cut = split_step(inputs, parts)
            results = join_parts([self._run_part(part.inputs, outputs, graph) for part in cut], cut)
            if not self._links.is_first:  # it fetches nothing, and would not see that its own GPU stands still
                self.device.synchronize()
        return self._links.collect(graph, results)

    def _run_part(self, inputs: StepInputs, outputs: Collection[str], graph: str) -> dict[str, np.ndarray]:
        """Run one micro-batch; its results are on the host before the next one takes their place."""
        wanted = wanted_of(outputs, self._part.plans[graph])
        choices = self._choices.get(graph, [])
        fetched = self._backend.run(inputs, outputs=sorted({*wanted, *choices}), graph=graph)
        for name in choices:
            self._check.require(name, fetched.fetch(name))
        if not self._links.is_first:  # of its stage, which gives the results: the others would fetch the same
            return {}
        return {name: fetched.fetch(name) for name in wanted}

    def cache(self, name: str) -> np.ndarray | None:
        """Return a copy of one layer's cache; None where its stage is another."""
        cached = {spec.name for pieces in self._part.plans.values() for io in pieces for spec in io.with_role("cache")}
        return self._backend.cache(name) if name in cached else None

    def check_update(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Refuse new weights that do not belong to the model, or not together.

        Raises:
            EngineError: see `LLM.update_weights`.
        """
        changed_constants(self._bindings, tensors)

    def update_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write this rank's part of what reads `tensors`, which `check_update` passed."""
        self._backend.write_weights(tensors)

    def graph_metrics(self) -> GraphMetrics:
        """Return what became of CUDA graphs on this rank."""
        return self._backend.graph_metrics()

    def abort(self) -> None:
        """End what waits for a rank that is lost. Called from another thread."""
        if self.device.group is not None:
            self.device.group.abort()

    def close(self) -> None:
        """Give back plans, weights, caches and the device."""
        self._backend.close()


def _open_gpu(folder: Path, manifest: Manifest, number: int, join: Join | None) -> Device:
    from seekforge.runtime.backends.tensorrt.cuda import CudaDevice  # needs a driver and TensorRT

    return CudaDevice(folder, manifest, number=local_number(number), join=join)
