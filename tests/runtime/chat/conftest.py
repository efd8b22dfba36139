"""Fixtures: a tokenizer with every token that conversations have."""

from __future__ import annotations

import pytest

from seekforge.exporter.checkpoint.tokenizer import write_tokenizer
from seekforge.runtime.text.tokenizer import Tokenizer

VOCAB = 1024


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer in DeepSeek's layout."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, VOCAB)
    return Tokenizer(folder / "tokenizer.json")
