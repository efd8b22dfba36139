"""Files that others may write to are read: what is mapped ends the process (SIGBUS) when its file shrinks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MAPS = re.compile(r"\bmemmap\(|\bmmap\.mmap\(|\bsafe_open\(|\.from_file\(|load_external_data|mmap_mode|mmap=True")
#: The modules that map a file, and why each may.
KNOWN = {
    "exporter/seekforge/exporter/builder/onnxruntime/fold.py": "a file of this process, beside nothing that is named",
    "plugins/seekforge/formats/engine/ranks.py": "weights of an engine, which builds replace and never write to",
    "runtime/seekforge/runtime/backends/ranks/shared_memory.py": "memory without a name",
}


def test_only_files_of_our_own_are_mapped() -> None:
    found = {
        str(path.relative_to(ROOT))
        for root in ("exporter", "plugins", "runtime")
        for path in (ROOT / root).rglob("*.py")
        if _MAPS.search(path.read_text(encoding="utf-8"))
    }
    assert found == set(KNOWN)
