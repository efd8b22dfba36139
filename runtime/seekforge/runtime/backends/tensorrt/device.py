"""What a GPU backend needs of a device: memory, one stream, and plans that run on it. `cuda.py` has the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np

#: Smallest, typical and largest shape of an input, of one profile.
Bound = tuple[tuple[int, ...], ...]
#: The execution context, one per profile, of all runs that are not captured.
SHARED: Final = 0


@dataclass
class Call:
    """What a plan is told for one run. One plan may serve many calls, each with memory of its own.

    Attributes:
        addresses: input or output -> where it lies.
        shapes: input -> its shape.
        profile: number of the optimization profile.
        context: number of the execution context: `SHARED`, or one of a captured graph's own.
        specialized: whether kernels are compiled for the very shapes before they run (`Plan.enqueue` then waits for
            that), which pays for shapes that come again. Contexts differ by it.
        watched: debug tensors that are handed to `seen` while the step runs, on the host (bf16 as f32); the others
            rest. A watched run cannot be captured.
    """

    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    profile: int = 0
    context: int = SHARED
    specialized: bool = False
    watched: frozenset[str] = frozenset()
    seen: Callable[[str, np.ndarray], None] = lambda name, value: None


class Group(Protocol):
    """The tensor-parallel ranks that add up with a device, each of which makes the same calls in the same order."""

    @property
    def communicator(self) -> object:
        """What an execution context takes as its communicator."""
        ...

    @property
    def is_aborted(self) -> bool:
        """Whether its sums were ended: nothing of what they gave is right."""
        ...

    def agree(self, fine: bool) -> bool:
        """Return whether all ranks say that it went well; waits for them."""
        ...

    def abort(self) -> None:
        """End every sum that is under way, since a rank is lost. Called from another thread."""
        ...

    def close(self) -> None:
        """Give the communicator back."""
        ...


#: Finds the ranks that add up with a device; is given what makes the GPU the current one of the thread that calls it.
Join = Callable[[Callable[[], None]], Group]


class Plan(Protocol):
    """One deserialized engine with its execution contexts."""

    def names(self) -> list[str]:
        """Names of all inputs and outputs."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all inputs and outputs by name; −1 where a size is free or not known."""
        ...

    def bounds(self) -> list[dict[str, Bound]]:
        """Shapes of each input with free sizes, by profile; empty: it has none."""
        ...

    def aliases(self) -> dict[str, str]:
        """Return output -> input whose memory it shares, as far as the library tells."""
        ...

    def enqueue(self, call: Call) -> None:
        """Start a run on the device's stream. What the call says is read now: it may change afterwards.

        Raises:
            EngineError: TensorRT refuses it.
            MemoryError: there is none for its execution context.
        """
        ...

    def is_stream_capturable(self, call: Call) -> bool:
        """Return whether the library says that this run, which has been enqueued just now, can be captured."""
        ...

    def release(self, context: int) -> None:
        """Give back the execution contexts of this number, if there are any. No run of them may be under way."""
        ...


class Device(Protocol):
    """Device memory and one stream, on which everything happens in order."""

    @property
    def group(self) -> Group | None:
        """The ranks that add up with it; None: it is alone."""
        ...

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new memory.

        Raises:
            MemoryError: there is not enough.
        """
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def zero(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy from the host; `array` may change afterwards."""
        ...

    def staging(self, num_bytes: int) -> np.ndarray:
        """Return host memory, uint8[num_bytes], from which copies run beside other work."""
        ...

    def upload_staged(self, address: int, array: np.ndarray) -> None:
        """Start a copy from memory of `staging`, which must not change before `synchronize`."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that was started.

        Raises:
            SilentGpuError: it does not come to its end (`waiting`).
        """
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy to the host and wait for it."""
        ...

    def open_plan(self, path: Path) -> Plan:
        """Load a compiled engine.

        Raises:
            EngineError: it cannot be loaded.
        """
        ...

    def capture(self, work: Callable[[], None]) -> int:
        """Record what `work` starts as a graph, without running it.

        Raises:
            EngineError: it cannot be recorded, which leaves the stream as it was.
            MemoryError: there is none for the graph.
        """
        ...

    def launch(self, graph: int) -> None:
        """Start a recorded graph."""
        ...

    def forget(self, graph: int) -> None:
        """Give back a recorded graph."""
        ...

    def close(self) -> None:
        """Give back the stream and what is recorded."""
        ...
