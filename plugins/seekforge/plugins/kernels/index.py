"""Where compiled kernels come from: launch descriptors, found by operator, SM and digest.

A plan carries the digest of the kernels that each plugin was built with, never the kernels. At load the plugin asks a
`LauncherSource` for a launcher of exactly that digest and of the GPU's SM; there is no second best. The kernels
lie in the engine folder, `kernels/index.json` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from seekforge.common.errors import EngineError
from seekforge.common.paths import inside, name_fault
from seekforge.common.reading import read_json

#: Folder of an engine with kernels, the file in it that lists them, and the version of that file.
KERNELS, INDEX, INDEX_FORMAT = "kernels", "index.json", 1
#: Digest in the plan of a plugin that was built while no kernels existed.
NO_KERNELS: Final = ""


class Launcher(Protocol):
    """The kernels of one operator for one set of attributes, loaded for the current GPU."""

    def workspace_bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        """Return the scratch bytes for the largest input shapes."""
        ...

    def enqueue(
        self,
        input_shapes: Sequence[tuple[int, ...]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on `stream`; pointers are device addresses. Allocates none there, loads nothing, waits for nothing."""
        ...


class LauncherSource(Protocol):
    """Gives launchers; made once per engine by whoever opens it."""

    def launcher(self, op: str, *, attrs: Mapping[str, Any], products: str, digest: str) -> Launcher:
        """Return the launcher of `op` for these attributes.

        Args:
            op: ONNX op_type.
            attrs: attribute values of the spec.
            products: fp8 or bf16, the precision of matrix products.
            digest: that of the kernels with which the engine was built.

        Raises:
            EngineError: there are no such kernels.
        """
        ...


def kernel_sm(sm: int) -> int:
    """Return the SM whose kernels a GPU runs: its own, but sm86 those of sm80, which use no more than it has."""
    return 80 if sm == 86 else sm


class Descriptors:
    """The launch descriptors of an engine folder for one SM.

    Args:
        folder: the engine folder.
        sm: compute capability of the GPU, 89 for an L40S.

    Raises:
        EngineError: `kernels/index.json` is there and damaged.
    """

    def __init__(self, folder: Path, sm: int) -> None:
        self.folder, self.sm = folder / KERNELS, kernel_sm(sm)
        self._entries = read_index(self.folder)

    def find(self, op: str, digest: str) -> Path:
        """Return the descriptor of `op` with `digest` for this SM.

        Raises:
            EngineError: there is none, or the file is missing. The message says what there is.
        """
        if digest == NO_KERNELS:
            raise EngineError(
                f"{op}: the engine was built without compiled kernels, so it cannot run on sm{self.sm}; "
                "build it again without --no-kernels"
            )
        of_op = [entry for entry in self._entries if entry["op"] == op]
        for entry in of_op:
            if entry["sm"] == self.sm and entry["digest"] == digest:
                path = inside(self.folder, entry["file"], error=EngineError, where=self.folder / INDEX)
                if not path.is_file():
                    raise EngineError(f"{path}: missing; copy the whole engine folder again, or build it again")
                return path
        there = ", ".join(f"sm{entry['sm']} {entry['digest'][:12]}" for entry in of_op) or "none"
        raise EngineError(
            f"{op}: no kernels for sm{self.sm} with digest {digest[:12]} in {self.folder}; found {there}; "
            "build the engine again for this GPU"
        )


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the entries (op, sm, digest, file) of `index.json`; none when there is no such file.

    Raises:
        EngineError: the file is damaged or of another version.
    """
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        raw = read_json(path)
        entries = raw["kernels"] if raw["format"] == INDEX_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        entries = None
    keys = {"op": str, "sm": int, "digest": str, "file": str}
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and all(type(entry.get(key)) is kind for key, kind in keys.items())
        and name_fault(entry["file"]) is None
        for entry in entries
    ):
        raise EngineError(f"{path}: damaged or of another version, expected format {INDEX_FORMAT}; build again")
    return entries
