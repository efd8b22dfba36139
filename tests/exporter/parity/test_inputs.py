"""What a check is given is bounded before it costs anything."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from seekforge.common.errors import ConfigError
from seekforge.exporter.parity import inputs


def test_a_hopeless_prompt_is_not_encoded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer = tmp_path / "prompts", tiny_checkpoint / "tokenizer.json"
    path.write_text("the cat\n" + "1 2 " * 5, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"prompt 1 has \d+ tokens, 8 tokens are accepted here"):
        inputs._encoded_prompts(path, tokenizer, 8)
    assert [len(ids) > 0 for ids in inputs._encoded_prompts(path, tokenizer, 100)] == [True, True]
    encoder = inputs.read_tokenizer(tokenizer, error=ConfigError, again="")
    encoded: list[str] = []

    class Counted:
        get_vocab = encoder.get_vocab

        def encode(self, text: str, **how: bool) -> object:
            encoded.append(text)
            return encoder.encode(text, **how)

    assert isinstance(encoder, Tokenizer)
    monkeypatch.setattr(inputs, "read_tokenizer", lambda *_, **__: Counted())
    path.write_text("the cat\n" + "1 2 " * 100_000, encoding="utf-8")
    with pytest.raises(ConfigError, match="prompt 1 has 400,000 characters, 8 tokens are accepted here"):
        inputs._encoded_prompts(path, tokenizer, 8)
    assert encoded == ["the cat"]
