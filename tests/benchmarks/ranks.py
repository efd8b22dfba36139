"""What ranks cost on a CPU: a sum through the shared memory, a decode step of engines of one or more, and loading.

    python -m tests.benchmarks.ranks [--gigabytes N] ENGINE [ENGINE …]

Engines take their steps in turns, so what else the machine does is the same for all. With `--gigabytes`, experts of
true width are written (twice that space is needed: on disk and in memory), and two ranks, a process of one thread each,
load their parts of them at once from the page cache; beside it they read as many bytes plainly.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tests.benchmarks.full_size import plain_copy, wide_checkpoint

from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.loader import Loader, allocate
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.step_io import lay_out
from seekforge.formats.weight_recipes import Recipe, for_rank, split
from seekforge.runtime.backends.ranks.shared_memory import Memory, SharedMemory
from seekforge.runtime.engine.engine_folder import Engine

_SUMS, _STEPS, _LOADS = 2000, 100, 5
#: Along which axis ranks divide each expert: gate and up by rows, down by columns.
_CUT = {"w13": 1, "w13_scale": 1, "w2": 2, "w2_scale": 2}


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


def steps(folders: Sequence[str]) -> dict[str, list[float]]:
    """Return the seconds of decode steps of one sequence on each engine, one thread for each rank, taken in turns."""
    times: dict[str, list[float]] = {folder: [] for folder in folders}
    with contextlib.ExitStack() as opened:
        backends = {
            folder: opened.enter_context(contextlib.closing(Engine.open(folder).open_backend(threads=1)))
            for folder in folders
        }
        for backend in backends.values():
            backend.allocate_caches(4)
        for position in range(_STEPS):
            step = lay_out([[5 + position]], [position], [[1, 2]])
            for folder, backend in backends.items():
                began = time.perf_counter()
                backend.run(step, outputs={"top_ids"}).fetch("top_ids")
                times[folder].append(time.perf_counter() - began)
    return times


def expert_parts(recipes: Mapping[str, Recipe], parallelism: Parallelism, rank: int) -> dict[str, Recipe]:
    """Return what a rank reads of stacked experts: its own, or with tensor parallelism alone a part of each."""
    axes = {"w13": 0, "w13_scale": 0, "w2": 0, "w2_scale": 0} if parallelism.ep else _CUT
    return {
        name: for_rank(split(recipe, axes[name], parallelism.tp), parallelism, rank) for name, recipe in recipes.items()
    }


def _load(
    folder: Path, mine: Mapping[str, Recipe], dealt: Mapping[str, Recipe], rank: int, meet: Any, say: Any
) -> None:
    """Be a rank that loads its part and reads as much plainly, in turns, each time together with the others."""
    with Checkpoint.open(folder) as checkpoint:
        buffers, plain = allocate(mine), allocate(dealt)
        total = Loader(checkpoint, mine, buffers).total_bytes
        for turn in range(_LOADS + 1):  # the first fills the page cache and touches the buffers
            seconds: dict[str, float] = {}
            for name, scan in (("loader", False), ("loader with scan", True)):
                loader = Loader(checkpoint, mine, buffers, threads=1, scan=scan)
                meet.wait()
                seconds[name] = loader.run().seconds
            meet.wait()
            seconds["copy"] = plain_copy(checkpoint, dealt, plain, 1)
            if turn:
                say.put((rank, turn, total, seconds))


def loading(folder: Path, recipes: Mapping[str, Recipe], parallelism: Parallelism) -> dict[str, tuple[float, float]]:
    """Return GB/s of all ranks of a layout together, and the share of a plain copy, by what they did.

    In each turn the slowest rank counts; of turns the median.
    """
    context = multiprocessing.get_context("fork")
    meet, told = context.Barrier(parallelism.tp), context.Queue()
    ranks = []
    for rank in range(parallelism.tp):
        mine, dealt = (
            expert_parts(recipes, one, rank) for one in (parallelism, Parallelism(tp=parallelism.tp, ep=True))
        )
        ranks.append(context.Process(target=_load, args=(folder, mine, dealt, rank, meet, told)))
    for process in ranks:
        process.start()
    turns: dict[int, list[dict[str, float]]] = {}
    num_bytes = 0
    for _ in range(_LOADS * parallelism.tp):
        _, turn, size, seconds = told.get(timeout=600)
        turns.setdefault(turn, []).append(seconds)
        num_bytes += size
    for process in ranks:
        process.join()
    slowest = {
        name: statistics.median(max(one[name] for one in turn) for turn in turns.values()) for name in turns[1][0]
    }
    whole = num_bytes / _LOADS / 1e9
    return {name: (whole / seconds, slowest["copy"] / seconds) for name, seconds in slowest.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.0, help="how much two ranks load together; 0: nothing")
    parser.add_argument("engines", nargs="*")
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    for count in (512, 7168, 131_072):
        print(f"sum of {count:,} f32 over two processes: median {1e6 * sums(count):.0f} µs")
    taken = steps(options.engines) if options.engines else {}
    for folder, times in taken.items():
        share = statistics.median(one / first for one, first in zip(times, taken[options.engines[0]], strict=True))
        print(
            f"{folder}: decode step of one row: least {1e3 * min(times):.2f} ms, median "
            f"{1e3 * statistics.median(times):.2f} ms, {share:.2f} of the first engine's"
        )
    if options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            recipes = wide_checkpoint(Path(folder) / "wide", options.gigabytes)
            for parallelism in (Parallelism(tp=2, ep=True), Parallelism(tp=2)):
                for name, (speed, share) in loading(Path(folder) / "wide", recipes, parallelism).items():
                    print(f"{parallelism}, {name}: {speed:.2f} GB/s of both ranks, {share:.0%} of a copy")


if __name__ == "__main__":
    main()
