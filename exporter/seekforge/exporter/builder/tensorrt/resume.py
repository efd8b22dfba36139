"""Plans that an interrupted build has finished, kept beside the engine until it is whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from seekforge.common.files import sha256_file
from seekforge.exporter.builder.tensorrt.compiler import Compiled


@dataclass(frozen=True)
class Parts:
    """Plans that an interrupted build has finished, by what they were made from."""

    folder: Path

    def take(self, key: str, plan: Path, log: Path) -> Compiled | None:
        """Put the plan made from `key` at `plan`, and what the compiler said of it at `log`, if there is one.

        Returns what was known of it.
        """
        try:
            known = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            if sha256_file(self.folder / f"{key}.plan") != known.pop("sha256"):
                return None
            shutil.copyfile(self.folder / f"{key}.plan", plan)
            shutil.copyfile(self.folder / f"{key}.log", log)
            return Compiled(**known)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: str, plan: Path, compiled: Compiled, log: Path) -> None:
        """Remember a finished plan and what the compiler said of it; failing to is no error."""
        try:
            self.folder.mkdir(exist_ok=True)
            for name, write in (
                (f"{key}.plan", lambda path: shutil.copyfile(plan, path)),
                (f"{key}.log", lambda path: path.write_bytes(log.read_bytes() if log.is_file() else b"")),
                (
                    f"{key}.json",
                    lambda path: path.write_text(json.dumps(asdict(compiled) | {"sha256": sha256_file(plan)})),
                ),
            ):
                temporary = self.folder / f"{name}.{os.getpid()}"
                write(temporary)
                temporary.replace(self.folder / name)
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Forget all."""
        shutil.rmtree(self.folder, ignore_errors=True)
