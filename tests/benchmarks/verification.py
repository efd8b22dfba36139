"""What it costs to compare an engine with its digests at its first start, against reading it alone.

    python -m tests.benchmarks.verification ENGINE

Each round does the one after the other, in turns, on files in the page cache: it copies all bytes of the engine into
buffers with as many threads as the verification has, and it verifies them with nothing remembered. The ratio is what
the digests add; a second start, which reads nothing, is timed too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from seekforge.common.cores import usable_cores
from seekforge.formats.engine import verified
from seekforge.formats.engine.manifest import Manifest, load_manifest
from seekforge.formats.engine.verify import verify_files

ROUNDS: Final = 5
_PART: Final = 16 << 20


def read_all(folder: Path, manifest: Manifest) -> None:
    """Read every byte of an engine, part by part, with a thread per core."""
    parts = iter(
        [(folder / file.path, at) for file in manifest.files for at in range(0, file.bytes, _PART)],
    )
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(1 << 20))
        while True:
            with lock:
                part = next(parts, None)
            if part is None:
                return
            path, at = part
            with path.open("rb", buffering=0) as file:
                file.seek(at)
                left = _PART
                while left > 0 and (count := file.readinto(buffer[:left])):
                    left -= count

    threads = [threading.Thread(target=work) for _ in range(usable_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def seconds(work: Callable[[], object]) -> float:
    """Return what `work` takes on the wall."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Return bytes, medians in seconds, and the median ratio of the rounds."""
    manifest = load_manifest(folder)
    read_all(folder, manifest)  # into the page cache
    os.environ[verified.VARIABLE] = ""
    pairs = [
        (seconds(lambda: read_all(folder, manifest)), seconds(lambda: verify_files(folder, manifest)))
        for _ in range(rounds)
    ]
    with tempfile.TemporaryDirectory() as place:
        os.environ[verified.VARIABLE] = str(Path(place) / "verified.json")
        verify_files(folder, manifest)
        again = seconds(lambda: verify_files(folder, manifest))
    return {
        "bytes": sum(file.bytes for file in manifest.files),
        "threads": usable_cores(),
        "read_s": round(statistics.median(read for read, _ in pairs), 4),
        "verify_s": round(statistics.median(verify for _, verify in pairs), 4),
        "ratio": round(statistics.median(verify / read for read, verify in pairs), 2),
        "second_start_s": round(again, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="an engine folder, such as one of the preset small")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.engine, arguments.rounds)))


if __name__ == "__main__":
    main()
