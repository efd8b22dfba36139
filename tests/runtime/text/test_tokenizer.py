"""Streaming text byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime.text.tokenizer import Detokenizer, Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def path(toy_engine: Path) -> Path:
    return toy_engine / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize(
    "text", ["", "the cat", "日本語", "👩‍👩‍👧 family", "naïve", "龘𠮷", "a\n\tb", "\ufffd is a real character", "｜▁"]
)
def test_deltas_never_show_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    deltas = stream(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text == tokenizer.decode(tokenizer.encode(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


def test_a_rare_character_needs_several_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("龘")
    assert len(ids) == 3
    assert stream(tokenizer, ids) == ["", "", "龘", ""]


def test_a_cut_character_is_reported_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x龘")[:-1]
    assert stream(tokenizer, ids) == ["x", "", "", "\ufffd"]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 310), max_size=30))
def test_any_ids_stream_to_what_tokenizers_decodes(path: Path, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any bytes, special and unknown ids included: our deltas = our decode = the library's decode."""
    oracle = HfTokenizer.from_file(str(path)).decode(ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == oracle


def test_nothing_is_added_and_special_text_becomes_ids(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("the cat")
    assert tokenizer.encode(f"{BOS}the cat{EOS}") == [0, *plain, 1]
    assert tokenizer.decode([0, *plain, 1]) == "the cat"
    marked = tokenizer.encode("<think>the cat")
    assert len(marked) == len(plain) + 1 and tokenizer.decode(marked) == "<think>the cat"


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="valid Unicode"):
        tokenizer.encode("a\ud83d")


def test_other_files_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    with pytest.raises(EngineError, match="cannot be read as a tokenizer"):
        Tokenizer(broken)
    HfTokenizer(models.BPE()).save(str(broken))
    with pytest.raises(EngineError, match="expected ByteLevel"):
        Tokenizer(broken)


@pytest.mark.parametrize("token", [-1, 1 << 31, 1 << 40, -(1 << 70)])
def test_a_number_that_no_token_has_is_no_text_and_is_not_kept(tokenizer: Tokenizer, token: int) -> None:
    assert tokenizer.decode([token]) == ""
    assert token not in tokenizer._bytes
