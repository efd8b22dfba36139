"""CPU engines beside llama.cpp on the same weights: a script, not a test.

    python -m tests.benchmarks.cpu_vs_llama_cpp WORK --llama-source llama.cpp --json llama.json --chart llama.png

Needs llama-cpp-python, in this Python or in the one that `--llama-python` names, and once the source of llama.cpp,
whose converter writes the checkpoint as GGUF; its Q8_0 and Q4_0 are made of that by llama.cpp itself and stand beside
int8 and int4. WORK keeps what is made.

Every side is a process of its own on the same cores, with as many threads as cores, and waits while others have their
turn: in each round all sides have one, in changing order, and memory is read once. Speeds are medians over rounds, a
factor is the median of the rounds' own factors. `reads` is what a decode step makes of the bandwidth that was measured
in the same rounds, with the weights that it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.cpu.artifacts import GGUF_OF, check_converter, read_precisions, write_ggufs
from tests.benchmarks.cpu.compare import Opponents, parser_of, run
from tests.benchmarks.cpu.rounds import Side

from seekforge.common.errors import EnvironmentFault


def kinds_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return precision -> the format of the GGUF file beside it."""
    return {precision: GGUF_OF[precision] for precision in read_precisions(arguments.precisions)}


def check(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Refuse a comparison for which llama.cpp or its converter is missing."""
    check_converter(arguments.work, list(kinds_of(arguments).values()), arguments.llama_source)
    try:
        Side("llama.cpp", "tests.benchmarks.cpu.llama_cpp_side", options, python=arguments.llama_python).close()
    except (EnvironmentFault, OSError) as error:
        raise EnvironmentFault(
            f"{error}; --llama-python names a Python that has llama-cpp-python (pip install llama-cpp-python)"
        ) from None


def start(arguments: argparse.Namespace, options: dict[str, Any], stack: ExitStack) -> Mapping[str, Side]:
    """Start llama.cpp for each precision."""
    kinds = kinds_of(arguments)
    files = write_ggufs(arguments.work, list(kinds.values()), arguments.llama_source, options, arguments.llama_python)
    sides = {}
    for precision, kind in kinds.items():
        with_file = options | {"file": str(files[kind].resolve())}
        side = Side(
            f"llama.cpp {kind}", "tests.benchmarks.cpu.llama_cpp_side", with_file, python=arguments.llama_python
        )
        sides[precision] = stack.enter_context(side)
    return sides


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--llama-source", type=Path, help="folder of llama.cpp's source, for its converter")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    return run(parser, words, Opponents("against llama.cpp", check, start))


if __name__ == "__main__":
    sys.exit(main())
