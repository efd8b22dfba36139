"""Expressions that take long of a short text are refused; those of released tokenizers are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seekforge.common.errors import EngineError
from seekforge.formats.checkpoint.split_patterns import expressions, slow_fault
from seekforge.formats.checkpoint.tokenizer_file import read_tokenizer

DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
OTHERS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?|\p{N}{1,3}|\s*[\r\n]+",
    r"a{2,5}|[]a]+|[^]]*|\[+\(*|(?<=a)b|(?<name>a)?",
)
SLOW = (
    r"(a+)+$", r"(a*)*", r"(a|a)*$", r"(?:a?){300}a", r"(?:(?:a{1,9}){1,9}){2,}", r"a*a*a*$", r"(a)\1+", r"(a*a*|b)a*$",
    r"(?=(a+)+$)x", r"a{2,}+b", r"((a+))*", r"([^b]+)*", r"(?R)", r"(?<r>a\g<r>?)x", r"(?(1)a)", "a" * 5000, r"x)*",
    r"(?i:(?:\p{L}+)+)$", r"([[:alpha:]]+|b)*", r"(a{1,99}){1,99}",
)  # fmt: skip


@pytest.mark.parametrize("expression", [*DEEPSEEK, *OTHERS])
def test_what_released_tokenizers_have_is_good(expression: str) -> None:
    assert slow_fault(expression) is None


@pytest.mark.parametrize("expression", SLOW, ids=lambda text: text[:30])
def test_what_repeats_what_repeats_is_refused(expression: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert slow_fault(expression) is not None
    raw = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": expression}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(EngineError, match=r"tokenizer\.json: .*its expression .*; take another") as told:
        read_tokenizer(tmp_path / "tokenizer.json", error=EngineError, again="take another")
    assert len(str(told.value)) < 500 + len(str(tmp_path))


def test_expressions_are_looked_for_wherever_they_stand(tiny_checkpoint: Path) -> None:
    raw = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    assert list(map(slow_fault, expressions(raw))) == [None] * 3
    raw["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""}
    assert "(a+)+" in list(expressions(raw))
    assert list(expressions([])) == []
