"""Every `§` names a section of the specification; files and names on pages about the code are there."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "docs" / "spec.md"
#: Pages whose code spans name files and, behind a colon, what a file defines; and how they shorten the source roots.
MAPS = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"]
SHORT = {
    "exporter": "exporter/seekforge/exporter",
    "plugins": "plugins/seekforge/plugins",
    "formats": "plugins/seekforge/formats",
    "common": "plugins/seekforge/common",
    "runtime": "runtime/seekforge/runtime",
}
_PLACE = re.compile(r"(?P<path>[\w.<>-]+(?:/[\w.<>-]*)+)(?::(?P<name>\w+(?:\.\w+)*))?")
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
    not_ours = {SPEC, Path(__file__), *ROOT.glob("configs/checkpoints/*/tokenizer.json")}  # an alphabet has all signs
    return [path for path in paths if path.suffix in kinds and path.is_file() and path not in not_ours]


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


# --- files and names that pages mention ---------------------------------------------------------------------------


def named_files(name: str) -> list[Path]:
    """The files that a page means by `name`: from the top, or in a source root; `<op>` stands for any folder."""
    first, _, rest = re.sub(r"<\w+>", "*", name).rstrip("/").partition("/")
    places = [one for one in (first, SHORT.get(first)) if one]
    return next((files for place in places if (files := list(ROOT.glob(f"{place}/{rest}" if rest else place)))), [])


def defined(path: Path, dotted: str) -> bool:
    """Whether a module has a class, function or constant, or a class in it a method."""
    body = ast.parse(read(path)).body
    for name in dotted.split("."):
        node = next((one for one in body if name in _names(one)), None)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_files_and_names_that_a_page_mentions_are_there(page: Path) -> None:
    wrong = []
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.MULTILINE | re.DOTALL)):
        match = _PLACE.fullmatch(span)
        if match is None:
            continue
        files = named_files(match["path"])
        if not files or (match["name"] and not any(defined(path, match["name"]) for path in files)):
            wrong.append(span)
    assert not wrong
