"""The options and the loop that comparisons of CPU engines share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.cpu.artifacts import make_checkpoint, make_engines, read_precisions, step_bytes
from tests.benchmarks.cpu.report import Comparison, Pair, publish, split
from tests.benchmarks.cpu.rounds import Case, Measured, Shared, Side, measure

from seekforge.common.cli.charts import check_chart
from seekforge.common.cores import usable_cores
from seekforge.common.errors import OptionError, SeekforgeError
from seekforge.formats.engine.manifest import load_manifest


@dataclass(frozen=True)
class Opponents:
    """The other sides.

    Attributes:
        title: what the comparison is called.
        check: is given the arguments and the options that all sides have; refuses what cannot be done, before hours
            of work.
        start: is given both, and what ends the sides; returns precision -> side. Several precisions may have one.
    """

    title: str
    check: Callable[[argparse.Namespace, dict[str, Any]], None]
    start: Callable[[argparse.Namespace, dict[str, Any], ExitStack], Mapping[str, Side]]


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all comparisons have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of checkpoint, engines and files; what is missing is made")
    parser.add_argument("--preset", default="small", help="of the checkpoint, where there is none")
    parser.add_argument("--precisions", default="f32,int8,int4")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--decode", default="64,512,2048", help="contexts behind which one token a step is decoded")
    parser.add_argument("--decode-8", default="64,512", help="the same, of eight sequences")
    parser.add_argument("--prefill", default="512,2048", help="prompts")
    parser.add_argument("--alone", default="16384", help="contexts of decoding at which only ours runs")
    parser.add_argument("--tokens", type=int, default=16, help="steps of a turn of decoding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, of one thread: for a busy machine")
    parser.add_argument("--json", type=Path, dest="report")
    parser.add_argument("--chart", type=Path)
    return parser


def cases_of(arguments: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """Return what both sides do, and what ours does alone."""
    both = [
        *(Case("decode", context) for context in split(arguments.decode)),
        *(Case("decode", context, 8) for context in split(arguments.decode_8)),
        *(Case("prefill", context) for context in split(arguments.prefill)),
    ]
    return both, [Case("decode", context) for context in split(arguments.alone)]


def compare(arguments: argparse.Namespace, opponents: Opponents) -> Comparison:
    """Make what is missing, start the sides, measure every case."""
    if arguments.cpu_time and arguments.threads != 1:
        raise OptionError("--cpu-time counts threads that wait as work; give --threads 1 with it")
    if arguments.chart is not None:
        check_chart(arguments.chart)
    both, alone = cases_of(arguments)
    precisions = read_precisions(arguments.precisions)
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = usable[-arguments.threads :]  # what else a machine does is most often on the first
    options = {
        "threads": arguments.threads,
        "cores": cores,
        "clock": "cpu" if arguments.cpu_time else "wall",
    }
    opponents.check(arguments, options)
    arguments.work.mkdir(parents=True, exist_ok=True)
    make_checkpoint(arguments.work, arguments.preset)
    engines = make_engines(arguments.work, arguments.preset, precisions)
    room = max((case.batch * (case.context + arguments.tokens + 64) for case in (*both, *alone)), default=64)
    results: list[Measured] = []
    with ExitStack() as stack:
        theirs = opponents.start(arguments, options, stack)
        memory = stack.enter_context(Side("memory", "tests.benchmarks.cpu.memory_side", options))
        ours = {}
        for precision, folder in engines.items():
            asked_for = {"folder": str(folder), "batch": 8, "tokens": room}
            ours[precision] = stack.enter_context(
                Side(precision, "tests.benchmarks.cpu.engine_side", options | asked_for)
            )
        others = list(dict.fromkeys(theirs.values()))
        sides = [*ours.values(), *others]
        if theirs and len(others) == len(ours):
            sides = [side for precision in precisions for side in (ours[precision], theirs[precision])]
        shared = Shared([memory, *sides])
        vocab_size = load_manifest(next(iter(engines.values()))).vocab_size
        for case in (*both, *alone):
            taking_part = list(ours.values()) if case in alone else sides
            found = measure(
                taking_part,
                memory,
                case,
                rounds=arguments.rounds,
                steps=arguments.tokens,
                vocab_size=vocab_size,
            )
            results += found
            words = ", ".join(f"{one.side} {one.speed:.1f}" for one in found)
            print(f"{case.what} {case.context} x {case.batch}: {words} tok/s", file=sys.stderr, flush=True)
        pairs = tuple(
            Pair(side.name, theirs[precision].name, step_bytes(engines[precision])) for precision, side in ours.items()
        )
        return Comparison(
            opponents.title,
            pairs,
            tuple(results),
            arguments.rounds,
            arguments.tokens,
            arguments.threads,
            options["clock"],
            shared.share(),
        )


def run(parser: argparse.ArgumentParser, words: Sequence[str] | None, opponents: Opponents) -> int:
    """Compare, print and write; return the exit code. What cannot be done is one line."""
    arguments = parser.parse_args(words)
    try:
        publish(compare(arguments, opponents), report=arguments.report, chart=arguments.chart)
    except SeekforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
