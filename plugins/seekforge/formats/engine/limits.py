"""The rule of an engine's limits, one for builds and for manifests that are read.

A sequence is no longer than the positions that the model was trained for, a step holds at least one token of each of
its sequences, and every size is a 31-bit number. (How the limits cut the profiles of a GPU is in
`exporter/builder/tensorrt/profiles.py`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from seekforge.formats.engine.manifest import Limits

#: Graphs, operators and libraries keep sizes in 31 bits.
MOST: Final = 2**31 - 1
#: Why a step has no fewer tokens than sequences.
ONE_TOKEN_EACH: Final = "a decode step has one token of each sequence"


def range_fault(limits: Limits, longest: int | None, spelled: Callable[[str], str]) -> str | None:
    """Return which limit no engine can have, and what is expected; None where each is possible by itself.

    Args:
        limits: the limits of an engine.
        longest: `max_position_embeddings` of the model; None where nobody knows it.
        spelled: name of a limit -> how the reader knows it, such as an option or a key of the manifest.
    """
    for name, value in limits.model_dump().items():
        most, why = MOST, ""
        if name == "max_model_len" and longest is not None and longest < MOST:
            most, why = longest, " (max_position_embeddings of the model)"
        if not 1 <= value <= most:
            return f"{spelled(name)} is {value}, expected 1 to {most}{why}"
    return None


def step_fault(limits: Limits, spelled: Callable[[str], str]) -> str | None:
    """Return why a step cannot hold its sequences; None where it can. Arguments as of `range_fault`."""
    batch, tokens = limits.max_batch_size, limits.max_num_batched_tokens
    if batch <= tokens:
        return None
    return (
        f"{spelled('max_num_batched_tokens')} is {tokens}, expected at least {spelled('max_batch_size')} {batch}: "
        f"{ONE_TOKEN_EACH}"
    )
