"""Fixtures: a tokenizer with every token that conversations have."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.exporter.checkpoint.tokenizer import write_tokenizer
from seekforge.runtime.text.tokenizer import Tokenizer

VOCAB = 1024


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of a small tokenizer in DeepSeek's layout."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, VOCAB)
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """A small tokenizer in DeepSeek's layout."""
    return Tokenizer(tokenizer_file)
