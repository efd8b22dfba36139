"""The presets that ship, and what is said about one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.check_tokenizer import check_tokenizer
from seekforge.exporter.checkpoint.presets import known_presets, load_preset, read_preset
from seekforge.exporter.checkpoint.schema import expected_tensors, totals
from seekforge.exporter.checkpoint.tokenizer import train_tokenizer, write_tokenizer
from seekforge.formats.end_of_sequence import end_ids


def test_the_presets_ship() -> None:
    assert {"full", "glm5-full", "glm5-tiny", "nano", "small", "tiny", "tiny-v3"} <= set(known_presets())


@pytest.mark.parametrize("name", known_presets())
def test_every_preset_is_a_valid_config(name: str) -> None:
    preset = load_preset(name)
    family = "glm5-full" if preset.config.model_type == "glm_moe_dsa" else "full"
    released = load_preset(family).config_json.keys()
    indexer = {"index_n_heads", "index_head_dim", "index_topk"} if preset.config.model_type == "deepseek_v3" else set()
    # by frequency in the released file, or layer by layer; a tokenizer made for tests has a token that begins a text
    said = {"index_topk_freq", "index_topk_pattern", "index_skip_topk_offset", "indexer_types", "bos_token_id"}
    assert preset.config_json.keys() ^ (released - indexer) <= (said if family == "glm5-full" else set())


def test_small_is_of_benchmark_size() -> None:
    assert 150e6 < totals(expected_tensors(load_preset("small").config)).num_parameters < 250e6


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_nearly_every_id_a_model_can_answer_has_a_token(name: str) -> None:
    vocab_size = load_preset(name).config.vocab_size
    assert 0.9 * vocab_size < train_tokenizer(vocab_size).get_vocab_size() < vocab_size


@pytest.mark.parametrize("name", known_presets())
def test_every_end_of_sequence_has_a_token(name: str, tmp_path: Path) -> None:
    config = load_preset(name).config
    write_tokenizer(tmp_path, config.vocab_size, end_ids(config.eos_token_id))
    assert check_tokenizer(tmp_path, config) == ()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for end in end_ids(config.eos_token_id):
        token = tokenizer.id_to_token(end)
        assert tokenizer.encode(token).ids == [end] and tokenizer.decode([end]) == ""
    text, plain = "Once upon a time<think>2+2</think>", train_tokenizer(config.vocab_size)
    assert tokenizer.encode(text).ids == plain.encode(text).ids


def test_full_has_the_published_softmax_scale() -> None:
    assert load_preset("full").config.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)


@pytest.mark.parametrize("name", ["huge", "", "../models/tiny", "tiny.yaml"])
def test_an_unknown_preset_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is unknown; known presets: full, glm5-full, glm5-tiny, nano, small, tiny"):
        load_preset(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_shards: 0\nconfig: {}", "'num_shards'"),
        ("num_shards: 1\nconfig: {}\nseed: 3", "unknown key 'seed', known: num_shards, config"),
        ("num_shards: 1", "'config'"),
        ("{", "not valid YAML"),
        ("num_shards: 1\nconfig: {rope_theta: .inf}", r"x\.yaml: line 2 is '\.inf', expected a finite number"),
        ("3", "is 3, expected an object with the keys num_shards, config"),
        ("num_shards: 1\nconfig: {model_type: llama}", "model_type is 'llama'"),
    ],
)
def test_a_malformed_preset_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_preset(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)
