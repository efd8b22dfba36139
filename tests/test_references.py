"""Every `§` in the code and in the pages names a section that the specification has."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "docs" / "spec.md"
_SECTION = re.compile(r"§\s*(\d+(?:\.\d+)*)")
_REFERENCE = re.compile(r"\b[Ss]pec (?:§\d+(?:\.\d+)*(?:, (?:and )?(?=§)| and (?=§))?)+")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def sections() -> frozenset[str]:
    return frozenset(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", read(SPEC), re.MULTILINE))


def sources() -> list[Path]:
    """Every text file of the tree that may refer to the specification, but the specification and this test."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository here: the files of the tree are not known")
    kinds = {".py", ".md", ".yaml", ".toml", ".html", ".json", ""}
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in kinds and path.is_file() and path not in (SPEC, Path(__file__))]


def test_the_code_refers_to_sections_that_the_specification_has() -> None:
    wrong = []
    for path in sources():
        text = re.sub(r"\n[ \t]*(?:#:?)?[ \t]*", " ", read(path))  # a reference may be broken over two lines
        within = [span for match in _REFERENCE.finditer(text) for span in range(*match.span())]
        for match in re.finditer(r"§", text):
            number = _SECTION.match(text, match.start())
            if number is None or number[1] not in sections() or match.start() not in within:
                wrong.append(f"{path.relative_to(ROOT)}: ...{text[max(0, match.start() - 40) : match.end() + 10]}")
    assert not wrong, "\n".join(["written as `spec §n`, with a heading n in docs/spec.md:", *wrong])


def test_the_specification_refers_to_its_own_sections() -> None:
    assert set(_SECTION.findall(read(SPEC))) <= sections()
