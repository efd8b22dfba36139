"""Turns of several sides in one run, so that a busy machine slows all alike: processes, rounds, medians and spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from seekforge.common.errors import EnvironmentFault

ROOT = Path(__file__).parents[3]
_HERTZ = os.sysconf("SC_CLK_TCK")


class Side:
    """One contender in a process of its own, which waits while others have their turn."""

    def __init__(self, name: str, module: str, options: dict[str, Any], *, python: str = sys.executable) -> None:
        """Start it and wait until it has loaded.

        Args:
            name: what tables call it.
            module: the module that it runs, which calls `protocol.serve`.
            options: told to it; `cores` and `clock` are among them.
            python: the interpreter.

        Raises:
            EnvironmentFault: it did not load, such as where a library is not installed.
        """
        self.name = name
        self._said = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 (closed by close)
        read, write = os.pipe()
        self._answers = os.fdopen(read, encoding="utf-8")
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, json.dumps(options), str(write)],
                stdin=subprocess.PIPE,
                stdout=self._said,
                stderr=self._said,
                text=True,
                cwd=ROOT,
                pass_fds=(write,),
            )
        except OSError:
            self._answers.close()
            self._said.close()
            raise
        finally:
            os.close(write)
        try:
            self._answer()
        except EnvironmentFault:
            self.close()
            raise

    def call(self, name: str, **keywords: Any) -> Any:
        """Have one function of the side called and return its result.

        Raises:
            EnvironmentFault: it failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, keywords]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._said.seek(0)
            last = ([text for text in self._said.read().splitlines() if text.strip()] or ["it said nothing"])[-1]
            raise EnvironmentFault(f"{self.name} ended: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise EnvironmentFault(f"{self.name}: {answer['error']}")
        return answer["result"]

    def cpu_seconds(self) -> float:
        """Return the processor seconds that its process has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _HERTZ

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Case:
    """What is measured: `prefill` of a prompt, or `decode` behind `batch` prompts.

    Attributes:
        what: "prefill" or "decode".
        context: tokens of each prompt.
        batch: prompts.
    """

    what: str
    context: int
    batch: int = 1


@dataclass
class Measured:
    """The turns of one side at one case.

    Attributes:
        case: what was measured.
        side: the name of the side.
        speeds: tokens a second, of each round.
        read: bytes a second that memory was read at in each round.
    """

    case: Case
    side: str
    speeds: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Median of the tokens a second."""
        return statistics.median(self.speeds)

    def to_json(self) -> dict[str, Any]:
        """Return what the report holds of it."""
        return {
            "what": self.case.what,
            "context": self.case.context,
            "batch": self.case.batch,
            "side": self.side,
            "tokens_per_s": self.speeds,
            "read_bytes_per_s": self.read,
        }


def factor(ours: Measured, theirs: Measured) -> tuple[float, float, float]:
    """Return the median, the least and the largest of the rounds' own factors."""
    each = [a / b for a, b in zip(ours.speeds, theirs.speeds, strict=True)]
    return statistics.median(each), min(each), max(each)


def prompts(case: Case, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return the prompts of a case, random ids."""
    rng = np.random.default_rng([case.context, case.batch, seed])
    return rng.integers(2, min(vocab_size, 1000), (case.batch, case.context)).tolist()


def measure(
    sides: Sequence[Side], memory: Side, case: Case, *, rounds: int, steps: int, vocab_size: int
) -> list[Measured]:
    """Give every side a turn in each round, in changing order, after one that does not count.

    Args:
        sides: the contenders.
        memory: the side that reads memory once a round.
        case: what is measured.
        rounds: turns of each.
        steps: decoded tokens of each sequence in a turn.
        vocab_size: ids of prompts are below it.
    """

    def turn(side: Side, seed: int) -> float:
        if case.what == "prefill":
            return case.context / side.call("prefill", prompt=prompts(case, vocab_size, seed)[0])
        return case.batch * steps / side.call("decode", steps=steps)

    results = [Measured(case, side.name) for side in sides]
    for side in sides:
        if case.what == "decode":
            side.call("hold", prompts=prompts(case, vocab_size))
        turn(side, rounds)
    for number in range(rounds):
        read = memory.call("read")
        pairs = list(zip(sides, results, strict=True))
        for side, result in pairs if number % 2 == 0 else reversed(pairs):
            result.speeds.append(turn(side, number))
            result.read.append(read)
    return results


class Shared:
    """How much of the machine others had since this was made: what a reader of the numbers must know."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides
        self.began, self.busy, self.ours = time.monotonic(), _busy_seconds(), self._own()

    def share(self) -> float:
        """Return the part of all cores that other processes kept busy, 0 to 1."""
        wall = (time.monotonic() - self.began) * (os.cpu_count() or 1)
        others = _busy_seconds() - self.busy - (self._own() - self.ours)
        return min(1.0, max(0.0, others / wall))

    def _own(self) -> float:
        return time.process_time() + sum(side.cpu_seconds() for side in self.sides)


def _busy_seconds() -> float:
    """Return the seconds that all cores together have worked since the machine was started."""
    user, nice, system, _, _, irq, soft_irq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft_irq) / _HERTZ
