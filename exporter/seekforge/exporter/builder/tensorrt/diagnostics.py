"""Say in plain words where in the model a node is: compilers report names, people know layers and operators."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from seekforge.exporter.models import FAMILIES, load_family

#: Part of a node's name -> what it is, of all families. What is outside layers has no layer's number before it.
_WORDS: Final = {name: words for known in FAMILIES for name, words in load_family(known).words().items()}
_NAME = re.compile(r"\b(?:layers\.\d+(?:\.[A-Za-z_]\w*)*|[a-z]\w*)/[A-Z]\w*")

#: What the compilers say when the scratch memory that they may use is too little. An allocation that fails at that
#: very size is TensorRT-RTX's way of saying it; a larger one is the machine's fault.
_TIGHT = re.compile(
    r"exceeding workspace limit|insufficient workspace|OutOfMemory \(Requested size was (?P<bytes>\d+) bytes"
)
_UNITS: Final = {"G": 1 << 30, "M": 1 << 20, "K": 1 << 10}


def place(name: str, alike: int = 0) -> str | None:
    """Return what a node's name means, or None when it is no name of ours.

    Args:
        name: the name of a node.
        alike: how many layers are compiled with this one.

    A name has the layer's number, the module below it and the operator; the family's table has words for the module.
    """
    module, slash, operator = name.partition("/")
    if not slash:
        return None
    operator = re.sub(r"(?:_\d+)+$", "", operator)
    match = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", module)
    if match is None:
        return f"{_WORDS[module]} (operator {operator})" if module in _WORDS else None
    part = match[2]
    inside = "" if part is None else f", {_WORDS.get(part, part)}"
    others = f" (and {alike} {'layer' if alike == 1 else 'layers'} like it)" if alike else ""
    return f"layer {match[1]}{others}{inside} (operator {operator})"


def explain(messages: list[str], alike: int = 0) -> str:
    """Return one sentence from a compiler's messages: where, then what it said first.

    Args:
        messages: errors in the order in which they came, not empty.
        alike: how many layers are compiled with each one, as `place` takes it.
    """
    text = " ".join(messages[0].split())
    where = _first_place(messages, alike)
    return text if where is None else f"{where}: {text}"


def too_tight(lines: Iterable[str], workspace_bytes: int, alike: int = 0) -> str | None:
    """Return what to do when the failure is that of a `--workspace` which is too small, or None when it is not.

    Args:
        lines: errors, then the log: where the compiler crashed, a warning in it is all that is left.
        workspace_bytes: how much was allowed.
        alike: how many layers are compiled with each one, as `place` takes it.
    """
    said = [
        line
        for line in lines
        if (match := _TIGHT.search(line)) and (match["bytes"] is None or int(match["bytes"]) <= workspace_bytes)
    ]
    if not said:
        return None
    layer = _first_place(said, alike)
    where = "" if layer is None else f" for {layer}"
    return f"--workspace {size_text(workspace_bytes)} is too small{where}: pass more, or leave it out"


def size_text(workspace_bytes: int) -> str:
    """Return a size as `--workspace` takes it."""
    unit = next((unit for unit, size in _UNITS.items() if workspace_bytes % size == 0), "")
    return f"{workspace_bytes // _UNITS.get(unit, 1)}{unit}"


def _first_place(lines: Iterable[str], alike: int) -> str | None:
    names = (match[0] for line in lines for match in _NAME.finditer(line))
    return next((where for name in names if (where := place(name, alike)) is not None), None)
