"""What ranks cost on a CPU: a sum through the shared memory, and a decode step of engines of one and more ranks.

python -m tests.benchmarks.ranks ENGINE [ENGINE …]
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time

import numpy as np

from seekforge.formats.parallelism import Parallelism
from seekforge.formats.step_io import lay_out
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory
from seekforge.runtime.engine.engine_folder import Engine

_SUMS, _STEPS = 2000, 100


def sums(num_floats: int, tp: int = 2) -> float:
    """Return the median seconds of a sum over `tp` processes."""
    memory = Memory(Parallelism(tp=tp))
    part = np.ones(num_floats, np.float32)
    others = []
    for rank in range(1, tp):
        child = os.fork()
        if child == 0:
            shared = SharedMemory(memory, rank, lambda: None)
            for _ in range(_SUMS):
                shared.sum(part)
            os._exit(0)
        others.append(child)
    shared = SharedMemory(memory, 0, lambda: None)
    times = []
    for _ in range(_SUMS):
        began = time.perf_counter()
        shared.sum(part)
        times.append(time.perf_counter() - began)
    for child in others:
        os.waitpid(child, 0)
    return statistics.median(times)


def steps(engine: str) -> tuple[float, float]:
    """Return the least and the median seconds of a decode step of one sequence, one thread for each rank."""
    backend = Engine.open(engine).open_backend(threads=1)
    with contextlib.closing(backend):
        backend.allocate_caches(4)
        times = []
        for position in range(_STEPS):
            step = lay_out([[5 + position]], [position], [[1, 2]])
            began = time.perf_counter()
            backend.run(step, outputs={"top_ids"}).fetch("top_ids")
            times.append(time.perf_counter() - began)
    return min(times), statistics.median(times)


if __name__ == "__main__":
    for count in (512, 7168, 131_072):
        print(f"sum of {count:,} f32 over two processes: median {1e6 * sums(count):.0f} µs")
    for folder in sys.argv[1:]:
        least, median = steps(folder)
        print(f"{folder}: decode step of one row: least {1e3 * least:.2f} ms, median {1e3 * median:.2f} ms")
