"""Processes that run one engine share the pages of its weight file: what the kernel counts for each of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from seekforge.common.system import child_environment
from seekforge.formats.engine.weight_file import WEIGHTS

#: Opens an engine, takes a step, and waits until it may end.
_CHILD = """
import sys
from seekforge.runtime import LLM, SamplingParams

with LLM(sys.argv[1], num_blocks=8, threads=1) as llm:
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    print("ready", flush=True)
    sys.stdin.readline()
"""


def mapped(pid: int, name: str) -> dict[str, int]:
    """Return what `/proc/PID/smaps` counts of the mappings of files with a name, in bytes."""
    found: dict[str, int] = {}
    is_file = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_file = words[-1].endswith(f"/{name}")
        elif is_file and words[-1] == "kB":
            found[words[0].rstrip(":")] = found.get(words[0].rstrip(":"), 0) + 1024 * int(words[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="/proc/PID/smaps is Linux's")
def test_two_processes_share_the_pages_of_the_weights(tiny_engines: dict[str, Path]) -> None:
    engine = tiny_engines["exact"]
    children: list[subprocess.Popen[str]] = []
    try:
        for _ in range(2):  # at once, each some three seconds
            words = [sys.executable, "-c", _CHILD, str(engine)]
            pipe = subprocess.PIPE
            children.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=child_environment()))
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        counts = [mapped(child.pid, WEIGHTS) for child in children]
    finally:
        for child in children:
            child.communicate("\n")
    for count in counts:
        # a copy made at load, or pages that were written to, would be its own
        assert count["Rss"] > (engine / WEIGHTS).stat().st_size // 4
        assert count["Private_Dirty"] == count["Anonymous"] == 0
        assert count["Pss"] < 0.7 * count["Rss"]
