"""How fast memory is read, measured as a side of a comparison: by summing an array far beyond any cache."""

from __future__ import annotations

from typing import Any

import torch
from tests.benchmarks.cpu.protocol import Clock, serve

_BYTES = 1 << 29


def make(options: dict[str, Any], clock: Clock) -> dict[str, Any]:
    torch.set_num_threads(options["threads"])
    array = torch.ones(_BYTES // 4)

    def read() -> float:
        """Return bytes a second."""
        began = clock()
        array.sum()
        return _BYTES / (clock() - began)

    return {"read": read}


if __name__ == "__main__":
    serve(make)
