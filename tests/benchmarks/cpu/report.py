"""What a comparison found, as Markdown for the docs, as JSON and as a chart."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.cpu.rounds import Case, Measured, factor

from seekforge.common.cli.charts import tokens, write_figure


@dataclass(frozen=True)
class Pair:
    """Two sides that are set against each other, and what a step of ours reads.

    Attributes:
        ours: the name of our side.
        theirs: the name of the other; None: only ours is measured.
        step_bytes: bytes of weights that one decode step of ours needs.
    """

    ours: str
    theirs: str | None
    step_bytes: int


@dataclass(frozen=True)
class Comparison:
    """All that a run measured.

    Attributes:
        title: what was compared.
        pairs: who with whom.
        results: of each case and side.
        rounds, steps, threads: how it was measured.
        clock: "wall" or "cpu".
        others: the part of all cores that other processes kept busy meanwhile.
    """

    title: str
    pairs: tuple[Pair, ...]
    results: tuple[Measured, ...]
    rounds: int
    steps: int
    threads: int
    clock: str
    others: float

    def of(self, case: Case, side: str) -> Measured | None:
        """Return what one side made of a case; None where it was not asked."""
        return next((one for one in self.results if (one.case, one.side) == (case, side)), None)

    def cases(self, what: str) -> list[Case]:
        """Return the cases of a kind in their order."""
        return list(dict.fromkeys(one.case for one in self.results if one.case.what == what))

    def to_json(self) -> dict[str, Any]:
        """Return everything that was measured."""
        return {
            "title": self.title,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "rounds": self.rounds,
            "steps": self.steps,
            "threads": self.threads,
            "clock": self.clock,
            "others_share": round(self.others, 3),
            "pairs": [vars(pair) for pair in self.pairs],
            "results": [one.to_json() for one in self.results],
        }


def machine() -> str:
    """Return the number of cores and their name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unknown processor'}"


def number(value: float) -> str:
    """Return a speed with three digits."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def cell(comparison: Comparison, pair: Pair, case: Case) -> str:
    """Return our speed, the other's, the factor with its spread, and the share of what memory gives."""
    ours = comparison.of(case, pair.ours)
    if ours is None:
        return "–"
    theirs = None if pair.theirs is None else comparison.of(case, pair.theirs)
    text = number(ours.speed)
    if theirs is None:
        text += f" ({number(min(ours.speeds))}–{number(max(ours.speeds))})"
    else:
        middle, least, most = factor(ours, theirs)
        text += f" / {number(theirs.speed)} = **{middle:.2f}×** ({least:.2f}–{most:.2f})"
    if case.what == "decode" and case.batch == 1:
        text += f", reads {read_share(ours, pair.step_bytes):.0%}"
    return text


def read_share(ours: Measured, step_bytes: int) -> float:
    """Return the part of the rounds' own read bandwidth that decoding one sequence makes of a step's weights."""
    return statistics.median(speed * step_bytes / read for speed, read in zip(ours.speeds, ours.read, strict=True))


def markdown(comparison: Comparison) -> str:
    """Return a table of decoding, one of prompts, and the line about machine and date."""
    parts = []
    for what in ("decode", "prefill"):
        cases = comparison.cases(what)
        if not cases:
            continue
        heads = [f"{what}, tok/s", *(pair.ours for pair in comparison.pairs)]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for case in cases:
            name = f"{case.context:,}" + (f", batch {case.batch}" if case.batch > 1 else "")
            cells = [cell(comparison, pair, case) for pair in comparison.pairs]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    read = statistics.median(value for one in comparison.results for value in one.read)
    needs = ", ".join(f"{pair.ours} {pair.step_bytes / 1e6:.0f}" for pair in comparison.pairs)
    kind = "processor" if comparison.clock == "cpu" else "wall"
    parts.append(
        f"{comparison.title}: ours / theirs, medians of {comparison.rounds} rounds of {comparison.steps} tokens, "
        f"factors of the rounds with least and largest. {machine()}, {time.strftime('%Y-%m-%d')}, "
        f"{comparison.threads} threads, {kind} seconds; others kept {comparison.others:.0%} of the cores busy. Memory "
        f"read {read / 1e9:.1f} GB/s; MB of weights that a decode step needs: {needs}."
    )
    return "\n\n".join(parts)


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the speeds of both sides: a chart for each kind and batch, groups of bars by precision and context."""
    kinds = list(dict.fromkeys((one.case.what, one.case.batch) for one in comparison.results))

    def fill(figure: Any) -> None:
        for axes, (what, batch) in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
            groups = [
                (pair, case) for pair in comparison.pairs for case in comparison.cases(what) if case.batch == batch
            ]
            for shift, color, name in ((-0.2, "#2f6fde", "seekforge"), (0.2, "#d9822b", "the other")):
                places, speeds, errors = [], [], ([], [])
                for place, (pair, case) in enumerate(groups):
                    side = pair.ours if shift < 0 else pair.theirs
                    measured = None if side is None else comparison.of(case, side)
                    if measured is None:
                        continue
                    places.append(place + shift)
                    speeds.append(measured.speed)
                    errors[0].append(measured.speed - min(measured.speeds))
                    errors[1].append(max(measured.speeds) - measured.speed)
                axes.bar(places, speeds, 0.4, color=color, label=name, yerr=errors, ecolor="0.3", capsize=2)
            labels = [f"{pair.ours}\n{tokens(case.context)}" for pair, case in groups]
            axes.set_xticks(range(len(groups)), labels, fontsize=8)
            axes.set_ylabel("tok/s")
            axes.set_title(f"{what}, batch {batch}" if what == "decode" else what, loc="left")
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
            axes.legend(fontsize="small", frameon=False)

    write_figure(path, (8.6, 3.2 * len(kinds)), fill, dpi=120)


def publish(comparison: Comparison, *, report: Path | None, chart: Path | None) -> None:
    """Print the tables; write JSON and chart where they are wanted."""
    print(markdown(comparison))
    if report is not None:
        report.write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
    if chart is not None:
        draw(comparison, chart)


def split(text: str) -> Sequence[int]:
    """Return the numbers of an option such as 64,512; none of an empty one."""
    return [int(part) for part in text.split(",") if part]
