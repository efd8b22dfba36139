"""Every kernel begins by waiting for the launches before it: one that did not could run before its inputs are there."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from tests import kernels_doc

from seekforge.plugins.registry import SPECS

#: (op, function) of every kernel that the full model needs.
ENTRIES = sorted({(op, variant.kernel) for (op, _, _), variant in kernels_doc.variants().items()})


def _functions(module: str) -> dict[str, ast.FunctionDef]:
    spec = importlib.util.find_spec(f"seekforge.plugins.{module}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("op", "entry"), ENTRIES)
def test_a_kernel_waits_before_anything_else(op: str, entry: str) -> None:
    functions = _functions("kernels.device_lib") | _functions(f"{SPECS[op].torch_name}.kernel")
    first = functions[entry].body[1]  # behind the docstring
    assert ast.unparse(first) == "wait_for_inputs()"


def test_what_waits_lets_the_next_launch_start_only_then() -> None:
    (guard,) = _functions("kernels.device_lib")["wait_for_inputs"].body[1:]
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "PROGRAMMATIC"
    assert [ast.unparse(one) for one in guard.body] == ["gdc_wait()", "gdc_launch_dependents()"]
