"""Which bytes were scanned before and found good, so that a scan is done once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from seekforge.common.files import write_json
from seekforge.common.reading import read_json
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.engine import verified
from seekforge.formats.weight_recipes import Recipe


class ScanMemory:
    """A JSON file of what was scanned: digest of index and files as they are -> digests of the sets of recipes."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._path = path
        digest = hashlib.sha256(checkpoint.index_digest().encode())
        whose = [verified.identity(checkpoint.folder / shard) for shard in sorted(checkpoint.shards)]
        digest.update(json.dumps(whose).encode())
        self._key = None if None in whose else digest.hexdigest()

    def knows(self, recipes: Mapping[str, Recipe]) -> bool:
        """Whether these very bytes were scanned before and found good."""
        return self._key is not None and _digest(recipes) in self._load().get(self._key, [])

    def remember(self, recipes: Mapping[str, Recipe]) -> None:
        """Note that they are good; a file that cannot be written only costs another scan."""
        if self._key is None:  # written just now
            return
        known = self._load()
        known[self._key] = sorted({*known.get(self._key, []), _digest(recipes)})
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, known)

    def _load(self) -> dict[str, list[str]]:
        try:
            raw = read_json(self._path)
        except (OSError, ValueError):
            return {}
        good = isinstance(raw, dict) and all(isinstance(value, list) for value in raw.values())
        return raw if good else {}


def _digest(recipes: Mapping[str, Recipe]) -> str:
    """Return a digest of what a set of recipes reads."""
    digest = hashlib.sha256()
    for name in sorted(recipes):
        digest.update(json.dumps([name, recipes[name].to_dict()]).encode())
    return digest.hexdigest()
