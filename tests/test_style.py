"""Names, docstrings and folders that a linter has no rule for: in the source roots, but for the text of kernels."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for root in ("exporter", "plugins", "runtime")
    for path in (ROOT / root).rglob("*.py")
    if path.name not in ("kernel.py", "device_lib.py")  # digested: their text is what was compiled
)
#: Names of variables and parameters that say when or from whom a value came, and not what it is.
VAGUE = frozenset({"asked", "found", "given", "mine", "own", "theirs"})
#: How a line of `Args` or `Attributes` begins that does not say what it names is, such as "config: of the model.".
FRAGMENT = re.compile(r"(?:of|per|by|from|under|into|in|on|to|that)\b(?! of\b)")
#: A folder of more modules is no longer read at a glance: it gets rooms.
MOST_MODULES = 16
ARGUMENT = re.compile(r" {4}([\w*]+(?:, [\w*]+)*): (.*)")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of every variable and parameter; fields of classes, which are data, are none."""
    fields = {
        id(statement.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
            yield node.lineno, node.id


def fragments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every argument that a docstring does not describe but attributes."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        in_section = False
        for line in (text or "").splitlines():
            if line and not line.startswith(" "):
                in_section = line in ("Args:", "Attributes:")
            match = ARGUMENT.fullmatch(line)
            if in_section and match and FRAGMENT.match(match[2]):
                yield getattr(node, "lineno", 1), line.strip()


def test_no_folder_has_more_modules_than_one_looks_over() -> None:
    numbers = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in numbers.items() if n > MOST_MODULES} == {}


def test_variables_are_named_after_what_they_hold() -> None:
    vague = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for line, name in bound_names(parsed(path))
        if name in VAGUE
    ]
    assert not vague, "\n".join(["say what it holds, not when or from whom it came:", *vague])


def test_docstrings_say_what_an_argument_is() -> None:
    lines = [f"{path.relative_to(ROOT)}:{line}: {text}" for path in SOURCES for line, text in fragments(parsed(path))]
    assert not lines, "\n".join(["say what it is, as in 'config: the model.':", *lines])


@pytest.mark.parametrize(
    "code", ["def f(found): ...", "given = 1", "for own in x: ...", "[asked for asked in x]", "lambda theirs: 1"]
)
def test_a_vague_name_is_seen(code: str) -> None:
    assert any(name in VAGUE for _, name in bound_names(ast.parse(code)))


def test_a_field_may_be_called_as_its_format_calls_it() -> None:
    assert list(bound_names(ast.parse("class Audit:\n    asked: str"))) == []


@pytest.mark.parametrize("words", ["of the model.", "that share the model.", "per thread.", "in order."])
def test_a_fragment_is_seen(words: str) -> None:
    code = f'def f(x):\n    """Do.\n\n    Args:\n        x: {words}\n    """'
    assert [text for _, text in fragments(ast.parse(code))] == [f"x: {words}"]


@pytest.mark.parametrize("words", ["the model.", "that of the kernels.", "which roundings it makes.", "with it, more."])
def test_what_says_something_is_no_fragment(words: str) -> None:
    code = f'class F:\n    """A thing.\n\n    Attributes:\n        x: {words}\n    """'
    assert list(fragments(ast.parse(code))) == []
