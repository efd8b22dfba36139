"""Steps of few tokens as CUDA graphs: when a bucket is captured, what is kept for it, what happens when it cannot be.

TensorRT's documentation sets the rules. A captured graph works in the internal state that its execution context had,
and other shapes change that state: so each bucket has contexts of its own, one per plan, which never see other shapes
(they share the device's scratch memory). The first enqueue after a change of shapes updates the state and must not be
captured: so the step that a capture belongs to is enqueued plainly, right before it, and that run is the step's result.
TensorRT-RTX must not swap kernels behind a graph's back: kernels are compiled for the shapes before the first run
(`Call.specialized`).

Nothing depends on a capture: a bucket that cannot be captured is enqueued from then on, in the contexts that all such
steps share. Ranks that add up capture a bucket all together, or none of them does (`device.Group.agree`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from seekforge.common.errors import EngineError
from seekforge.runtime.backends.base import GraphMetrics
from seekforge.runtime.backends.tensorrt.device import SHARED, Device
from seekforge.runtime.backends.tensorrt.device_graph import DeviceGraph

_LOG = logging.getLogger(__name__)
#: Buckets kept; each holds execution contexts and some device memory.
_MOST: Final = 128

#: Of one captured graph: graph name, B, Q, table width, logits rows, and the taps that are looked at.
Bucket = tuple[str, int, int, int, int, frozenset[str]]


@dataclass
class _Kept:
    """What a bucket holds. `recorded` is None where memory has moved since it was captured."""

    graph: DeviceGraph
    context: int
    recorded: int | None = None


class CudaGraphs:
    """The captured steps of one engine, the least recently used of which are given back when there are too many.

    Args:
        folder: the engine, for messages.
        device: the device that captures.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        self._folder, self._device = folder, device
        self._kept: OrderedDict[Bucket, _Kept] = OrderedDict()
        self._seen: set[Bucket] = set()
        self._refused: set[Bucket] = set()
        self._next_context = SHARED + 1
        self._captured = self._launched = self._failed = 0
        self._said = False

    @property
    def metrics(self) -> GraphMetrics:
        """What has happened since the engine was opened."""
        return GraphMetrics(self._captured, self._launched, self._failed)

    def start(self, graph: DeviceGraph, bucket: Bucket, profile: int) -> None:
        """Start a step: by the graph of its bucket, which is captured when the bucket comes the second time.

        Args:
            graph: whose inputs are in place.
            bucket: the bucket of the step.
            profile: the profile that takes it.

        Raises:
            EngineError: the step cannot be run, captured or not.
        """
        kept = self._kept.get(bucket)
        if kept is not None and kept.recorded is not None:
            self._kept.move_to_end(bucket)
            self._device.launch(kept.recorded)
            self._launched += 1
        elif graph.capturable and bucket in self._seen and bucket not in self._refused:
            self._capture(graph, bucket, profile)
        else:
            self._seen.add(bucket)
            if not graph.capturable:
                self._say(f"graph {graph.name} was built without the promise that it can be")
            self._enqueue(graph, profile)

    def drop_recorded(self) -> None:
        """Give back the graphs, since memory moves that they work in: each is captured anew when its bucket comes."""
        for kept in self._kept.values():
            self._forget(kept)

    def close(self) -> None:
        """Give back everything."""
        while self._kept:
            self._evict(next(iter(self._kept)))

    def _enqueue(self, graph: DeviceGraph, profile: int) -> None:
        # compiled for the shapes here too: a bucket gives the same bits captured or not
        graph.use(profile, SHARED, specialized=True)
        graph.enqueue()

    def _capture(self, graph: DeviceGraph, bucket: Bucket, profile: int) -> None:
        """Run the step in the contexts of its bucket, then record it in them."""
        kept = self._kept.get(bucket)
        if kept is None:
            while len(self._kept) >= _MOST:
                self._evict(next(iter(self._kept)))
            kept = self._kept[bucket] = _Kept(graph, self._next_context)
            self._next_context += 1
        self._kept.move_to_end(bucket)
        graph.use(profile, kept.context, specialized=True)
        try:
            graph.enqueue()
        except (EngineError, MemoryError) as error:
            if self._device.group is not None and isinstance(error, EngineError):
                raise  # the other ranks did not fail with this one, as they do for memory, and would add up once
            self._refuse(bucket, str(error))
            self._enqueue(graph, profile)  # what is wrong with the step itself is raised here; else it is written twice
            return
        except BaseException:
            self._evict(bucket)
            raise
        refusal = ""
        try:
            if not graph.is_stream_capturable():
                raise EngineError("TensorRT says that it is not stream capturable")
            kept.recorded = self._device.capture(graph.enqueue)
        except (EngineError, MemoryError) as error:
            refusal = str(error) or "no memory"
        group = self._device.group
        if group is not None and not group.agree(not refusal):
            refusal = refusal or "another rank cannot"
        if refusal:
            self._refuse(bucket, refusal)
        else:
            self._captured += 1

    def _refuse(self, bucket: Bucket, why: str) -> None:
        """Note that a bucket cannot be captured: once is enough to know."""
        self._refused.add(bucket)
        self._failed += 1
        self._evict(bucket)
        name, rows, width, *_ = bucket
        self._say(f"{rows} x {width} tokens of graph {name}: {why or 'no memory'}")

    def _say(self, why: str) -> None:
        """Warn, the first time."""
        level = logging.DEBUG if self._said else logging.WARNING
        _LOG.log(
            level,
            "%s: a step cannot be captured in a CUDA graph (%s); such steps are enqueued one by one, which is slower; "
            "later ones are counted in the metrics and not told",
            self._folder,
            why,
        )
        self._said = True

    def _evict(self, bucket: Bucket) -> None:
        kept = self._kept.pop(bucket)
        self._device.synchronize()  # the graph may still run, in its contexts
        self._forget(kept)
        kept.graph.release(kept.context)

    def _forget(self, kept: _Kept) -> None:
        recorded, kept.recorded = kept.recorded, None
        if recorded is not None:
            self._device.forget(recorded)
