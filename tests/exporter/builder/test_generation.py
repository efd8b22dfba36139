"""generation_config.json is obeyed or refused in one line, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seekforge.common.errors import ProgramError
from seekforge.exporter.builder.generation import FILE, read_generation
from seekforge.formats.checkpoint.model_config import ModelConfig


def write(folder: Path, value: object) -> Path:
    (folder / FILE).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("given", "defaults"),
    [
        ({}, {"temperature": 1.0, "top_p": 0.95}),
        ({"temperature": 0.6}, {"temperature": 0.6, "top_p": 0.95}),
        ({"top_k": 20, "min_p": 0.1}, {"temperature": 1.0, "top_p": 0.95, "top_k": 20.0, "min_p": 0.1}),
        ({"do_sample": True, "top_p": 1}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 9}, {"temperature": 0.0}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"transformers_version": "5.0", "pad_token_id": None}, {"temperature": 1.0, "top_p": 0.95}),
    ],
)
def test_defaults(tmp_path: Path, tiny_config: ModelConfig, given: dict, defaults: dict) -> None:
    assert read_generation(write(tmp_path, given), tiny_config).defaults == defaults


def test_a_missing_file_gives_the_model_cards(tmp_path: Path, tiny_config: ModelConfig) -> None:
    found = read_generation(tmp_path, tiny_config)
    assert found.defaults == {"temperature": 1.0, "top_p": 0.95}
    assert found.eos_token_ids == (tiny_config.eos_token_id,)


@pytest.mark.parametrize(
    ("given", "expected"), [(1, [1]), ([1], [1]), ([], [1]), (5, [1, 5]), ([7, 1, 5, 7], [1, 7, 5])]
)
def test_every_end_of_sequence_is_one(
    tmp_path: Path, tiny_config: ModelConfig, given: object, expected: object
) -> None:
    assert tiny_config.eos_token_id == 1
    assert list(read_generation(write(tmp_path, {"eos_token_id": given}), tiny_config).eos_token_ids) == expected


WRONG = {
    "temperature": [None, "0.6", [0.6], {}, True, -1, 1e400],
    "top_p": [None, "1", [], False, 0, 1.5, -0.1],
    "top_k": [None, "5", [5], True, 2.5, -2],
    "min_p": [None, "0", -1, 2],
    "repetition_penalty": [None, "1", 0, -1],
    "do_sample": [None, "false", 0, []],
    "eos_token_id": [None, "1", 1.0, True, -1, 10**6, [1, "2"], [[1]], [None], {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_cannot_be_is_one_line(tmp_path: Path, tiny_config: ModelConfig, name: str, value: object) -> None:
    with pytest.raises(ProgramError, match=r"generation_config\.json: ") as caught:
        read_generation(write(tmp_path, {name: value}), tiny_config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert name in str(caught.value) or "cannot be read" in str(caught.value)


@pytest.mark.parametrize("value", [None, "greedy", [], 1])
def test_a_file_that_is_no_object(tmp_path: Path, tiny_config: ModelConfig, value: object) -> None:
    with pytest.raises(ProgramError, match="expected an object"):
        read_generation(write(tmp_path, value), tiny_config)
