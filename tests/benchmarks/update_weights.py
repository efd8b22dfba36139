"""What it takes to give an engine new weights: all of a checkpoint's, from memory.

    python -m tests.benchmarks.update_weights CHECKPOINT ENGINE…

The engine's own weights are given to it again, ROUNDS times; what is timed is `LLM.update_weights` alone. Prints the
median of the seconds on the wall and of the process's time on its processors, with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Final

from seekforge import LLM
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.program import load_bindings
from seekforge.formats.weight_recipes import tensors_of

ROUNDS: Final = 7


def measure(checkpoint: Path, engine: Path) -> dict[str, float]:
    """Return seconds of an update, and what it was given."""
    with Checkpoint.open(checkpoint) as source, LLM(engine, num_blocks=16, threads=1) as llm:
        bindings = load_bindings(llm.engine.folder).values()
        names = {name for recipes in bindings for recipe in recipes.values() for name in tensors_of(recipe)}
        tensors = {name: source.tensor(name).copy() for name in names}
        llm.update_weights(tensors)  # reads the recipes, once
        wall: list[float] = []
        busy: list[float] = []
        for _ in range(ROUNDS):
            begin, worked = time.monotonic(), time.process_time()
            llm.update_weights(tensors)
            wall.append(time.monotonic() - begin)
            busy.append(time.process_time() - worked)
    size = sum(value.nbytes for value in tensors.values()) / 1e6
    return {"tensors": len(tensors), "MB": size, "wall": statistics.median(wall), "busy": statistics.median(busy)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engines", type=Path, nargs="+")
    options = parser.parse_args()
    for engine in options.engines:
        one = measure(options.checkpoint, engine)
        print(
            f"{engine}: {one['tensors']} tensors, {one['MB']:.1f} MB; {one['wall']:.2f} s on the wall, "
            f"{one['busy']:.2f} s of processor time"
        )


if __name__ == "__main__":
    main()
