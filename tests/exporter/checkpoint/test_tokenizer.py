"""The tokenizer has DeepSeek's special tokens, round-trips any text and loads in transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.tokenizer import BOS, EOS, train_tokenizer, write_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world",
    "  two  spaces\n\n\tand a tab\r\n",
    "def f(x):\n    return x + 1  # 12345\n",
    "你好，世界。こんにちは 안녕",
    "👩‍💻 🇫🇷 é é \u0000 \uffff",
    "<｜User｜>hello<｜Assistant｜><think>\n",
    '<｜DSML｜invoke name="x">',
]


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """The tokenizer of the preset tiny."""
    return train_tokenizer(1024)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """The same, for tests; hypothesis takes no fixture."""
    return tiny_tokenizer()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("vocab_size", [284 + 8, 1024, 8192])
def test_ids_stay_below_the_padded_vocabulary(vocab_size: int) -> None:
    assert max(train_tokenizer(vocab_size).get_vocab().values()) < vocab_size


@pytest.mark.parametrize(
    "token", [BOS, EOS, "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<｜▁pad▁｜>", "<|EOT|>"]
)
def test_special_tokens_are_single_ids(tokenizer: Tokenizer, token: str) -> None:
    assert len(encode(tokenizer, f"a{token}b")) == 3


def test_bos_and_eos_have_the_released_ids(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, BOS + EOS) == [0, 1]


def test_dsml_is_not_one_token(tokenizer: Tokenizer) -> None:
    assert len(encode(tokenizer, "｜DSML｜")) > 1


def test_nothing_is_added_to_a_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hello").ids == encode(tokenizer, "hello")


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(1024).to_str() == tokenizer.to_str()


def test_common_words_are_merged(tokenizer: Tokenizer) -> None:
    assert len(encode(tokenizer, " the")) == 1


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 256, expected at least"):
        train_tokenizer(256)


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_tokenizer(tmp_path, 1024)
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        loaded = loader.from_pretrained(tmp_path)
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)
        assert loaded.model_max_length == 131072
        for text in TEXTS:
            ids = loaded.encode(text)
            assert ids == encode(tiny_tokenizer(), text)
            assert loaded.decode(ids) == text
