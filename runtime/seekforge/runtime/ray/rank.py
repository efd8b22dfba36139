"""One rank other than 0: `RankProcess` holds it, in an actor on its bundle, and `main` is its process.

`python -m seekforge.runtime.ray.rank ENGINE` works as the rank that its variables name, until rank 0 closes the engine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from seekforge.common.errors import SeekforgeError
from seekforge.common.system import child_environment, end_with_parent
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.ray.placement import Seat

#: Characters of the last line of a process that are told.
_MOST_WORDS: Final = 500


def seat_here() -> Seat:
    """Return where Ray has put this actor."""
    import ray

    context = ray.get_runtime_context()
    gpus = tuple(str(one) for one in context.get_accelerator_ids().get("GPU", ()))
    return Seat(context.get_node_id(), ray.util.get_node_ip_address(), gpus)


class RankProcess:
    """The process of a rank, which ends with the one that has this object."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def seat(self) -> Seat:
        """Return where it is."""
        return seat_here()

    def start(self, engine: str, environment: Mapping[str, str]) -> int:
        """Start the process; return its id.

        Args:
            engine: the engine's folder.
            environment: variables that say which rank it is (`placement.environments_of`).
        """
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "seekforge.runtime.ray.rank", engine],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**child_environment(), **paths, **environment},
        )
        return self._process.pid

    def ended(self) -> str:
        """Wait until the process has ended, and pass on what it says meanwhile; return how it ended."""
        assert self._process is not None and self._process.stderr is not None
        last = ""
        for line in self._process.stderr:
            sys.stderr.write(line)
            last = line.strip()[:_MOST_WORDS] or last
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{how}: {last}" if last and code > 0 else how


def main() -> None:
    """Work as a rank of the engine that the first argument names."""
    end_with_parent()
    try:
        # its files on this machine are held against their digests; then it works as the rank, and does not return
        Engine.open(Path(sys.argv[1])).open_backend()
    except SeekforgeError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
