"""Code outside the families does not know what a layer is made of: it reads their tables."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.models import family_of

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "exporter" / "seekforge" / "exporter" / "models"
#: Presets that have, together, every kind of layer of every family, and the MTP layer.
PRESETS = ("tiny", "tiny-v3", "glm5-tiny")
#: Parts of names that are words of their own as well: they count behind the module that has them only.
WORDS = frozenset({"model", "mlp", "gate", "experts", "indexer", "norm", "head"})
#: Files that may: the trainer's own model, and what writes its parameters under the names of a checkpoint.
ALLOWED = {"exporter/seekforge/exporter/training/model.py", "exporter/seekforge/exporter/training/weights.py"}


@cache
def modules() -> re.Pattern[str]:
    """Return what finds the name of a module of a checkpoint in a text."""
    pieces: set[str] = set()
    for preset in PRESETS:
        config = load_preset(preset).config
        family = family_of(config)
        rows = [tensor for end in family.end_tensors(config) for tensor in end]
        rows += [
            tensor for layer in range(config.num_hidden_layers + 1) for tensor in family.layer_tensors(config, layer)
        ]
        for row in rows:
            parts = [
                part for part in row.name.removesuffix(".weight").removesuffix(".bias").split(".") if part != "{expert}"
            ]
            pieces.update(part for part in parts if part not in WORDS)
            pieces.update(f"{a}.{b}" for a, b in itertools.pairwise(parts) if {a, b} <= WORDS)
    return re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(map(re.escape, sorted(pieces)))})(?![A-Za-z0-9_])")


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module, parts of f-strings too, but for its docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def named_in(source: str) -> list[str]:
    """Return the modules of a checkpoint that the strings of some code name."""
    text = "\n".join(texts(ast.parse(source))).replace("\\.", ".")
    return sorted(set(modules().findall(text)))


def test_the_names_are_those_of_the_tables() -> None:
    pattern = modules()
    names = ("self_attn", "mlp.gate", "mlp.experts", "kv_b_proj", "embed_tokens", "lm_head", "eh_proj", "wk", "k_norm")
    assert all(pattern.fullmatch(name) for name in names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('x.endswith(("mlp.gate", "input_layernorm.weight"))', ["input_layernorm", "mlp.gate"]),
        ('f"layers.{n}.self_attn.{name}"', ["self_attn"]),
        (r're.compile(r"mlp\.experts\.0")', ["mlp.experts"]),
        ('"n_shared_experts", "the indexer", "a gate", "attn_norm", "q_b_proj_rows"', []),
        ('"""Of `self_attn`."""', []),
        ("layer.self_attn.o_proj", []),
    ],
)
def test_strings_are_searched_and_prose_is_not(source: str, names: list[str]) -> None:
    assert named_in(source) == names


def test_no_code_outside_the_families_names_modules_of_a_checkpoint() -> None:
    sources = [path for root in ("exporter", "plugins", "runtime") for path in (ROOT / root).rglob("*.py")]
    assert len(sources) > 100
    outside = {
        str(path.relative_to(ROOT)): names
        for path in sources
        if MODELS not in path.parents and (names := named_in(path.read_text(encoding="utf-8")))
    }
    assert outside.keys() == ALLOWED, "\n".join(f"{path}: {names}" for path, names in outside.items())
