"""CPU engines beside transformers' FP32 model on the same weights. A script, not a test.

    python -m tests.benchmarks.cpu_vs_transformers WORK --json transformers.json --chart transformers.png

How turns are taken and what is printed is said in `cpu_vs_llama_cpp.py`; here one opponent stands beside all engines.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.cpu.artifacts import dequantized, read_precisions
from tests.benchmarks.cpu.compare import Opponents, parser_of, run
from tests.benchmarks.cpu.rounds import Side

from seekforge.common.errors import EnvironmentFault


def check(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Refuse a comparison without transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise EnvironmentFault("transformers is not installed, and there is nothing to compare with")


def start(arguments: argparse.Namespace, options: dict[str, Any], stack: ExitStack) -> Mapping[str, Side]:
    """Start transformers, once for all precisions."""
    with_model = options | {"folder": str(dequantized(arguments.work).resolve()), "attention": arguments.attention}
    side = stack.enter_context(Side("transformers", "tests.benchmarks.cpu.transformers_side", with_model))
    return dict.fromkeys(read_precisions(arguments.precisions), side)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    return run(parser, words, Opponents("against transformers", check, start))


if __name__ == "__main__":
    sys.exit(main())
