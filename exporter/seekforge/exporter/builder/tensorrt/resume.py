"""Plans that an interrupted build has finished, kept beside the engine until it is whole.

What stands there may be anybody's: where a folder is shared, others can write beside an engine. It is read as any other
artifact is, and what does not fit is made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import OutputError
from seekforge.common.files import replace_file, replacing, sha256_file, write_json
from seekforge.common.paths import inside
from seekforge.common.reading import read_json
from seekforge.exporter.builder.tensorrt.compiler import Compiled

#: Copied at once; a plan has gigabytes.
_COPY_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Parts:
    """Plans that an interrupted build has finished, by what they were made from."""

    folder: Path

    def take(self, key: str, plan: Path, log: Path) -> Compiled | None:
        """Put the plan made from `key` at `plan`, and what the compiler said of it at `log`, if there is one.

        Returns what was known of it.
        """
        try:
            about, kept, said = (
                inside(self.folder, f"{key}.{ending}", error=OutputError, where=self.folder)
                for ending in ("json", "plan", "log")
            )
            known = read_json(about)
            sha256, compiled = known.pop("sha256"), _compiled(known)
            if sha256_file(kept) != sha256 or kept.stat().st_size != compiled.plan_bytes:
                return None
            shutil.copyfile(kept, plan)
            shutil.copyfile(said, log)
            return compiled
        except (OutputError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, key: str, plan: Path, compiled: Compiled, log: Path) -> None:
        """Remember a finished plan and what the compiler said of it; failing to is no error."""
        try:
            self.folder.mkdir(exist_ok=True)
            with plan.open("rb") as source, replacing(self.folder / f"{key}.plan") as file:
                shutil.copyfileobj(source, file, _COPY_BYTES)
            replace_file(self.folder / f"{key}.log", log.read_bytes() if log.is_file() else b"")
            write_json(self.folder / f"{key}.json", asdict(compiled) | {"sha256": sha256_file(plan)})
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Forget all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _compiled(known: dict[str, Any]) -> Compiled:
    """Make what the compiler said of plain values.

    Raises:
        TypeError: a field is unknown, missing, or of another type.
    """
    made = Compiled(**known)
    for one in fields(made):
        value = getattr(made, one.name)
        if not _FITS[str(one.type)](value):
            raise TypeError(f"{one.name} is {value!r:.60}, expected {one.type}")
    return made


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


#: Type of a field of `Compiled` -> whether a value of JSON is one.
_FITS: dict[str, Callable[[Any], bool]] = {
    "dict[str, int]": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "dict[str, str]": lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
    "list[int]": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "int": _is_count,
    "float": _is_number,
    "str": lambda value: isinstance(value, str),
    "bool | None": lambda value: value is None or isinstance(value, bool),
}
