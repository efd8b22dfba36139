"""The weights that come with the package do what their card says, on questions that they were not trained on."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from seekforge import train
from seekforge.common.configs import configs_folder
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.trained import copy_trained_checkpoint, trained_folder
from seekforge.exporter.training import tasks
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.scores import score
from seekforge.exporter.training.weights import read_weights
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint

FOLDER = configs_folder() / "checkpoints" / "nano"
#: Shares of the held-out items that are right, thoughts and all.
LEAST = {"arithmetic": 0.99, "recall": 0.95, "tools": 0.95}
ROWS = [json.loads(line) for line in (FOLDER / "quality.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    made = TrainedModel(load_preset("nano").config)
    with Checkpoint.open(FOLDER) as source:
        read_weights(made, source)
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def of(task: str, count: int) -> list[dict]:
    return [row for row in ROWS if row["task"] == task][:count]


def test_the_checkpoint_is_of_its_preset_and_small() -> None:
    assert ModelConfig.load(FOLDER) == load_preset("nano").config
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 15_000_000


def test_its_items_are_those_of_the_tasks() -> None:
    assert list(tasks.quality_rows(0, 200)) == ROWS


def test_it_is_written_with_its_card(tmp_path: Path) -> None:
    written = copy_trained_checkpoint(tmp_path / "nano", "nano")
    assert {path.name for path in written.path.iterdir()} == {path.name for path in FOLDER.iterdir()}
    assert "README.md" in {path.name for path in written.path.iterdir()} and trained_folder("tiny") is None


@pytest.mark.parametrize(
    ("task", "count"),
    [("arithmetic", 200), ("recall", 200), ("tools", 40), pytest.param("tools", 200, marks=pytest.mark.slow)],
)
def test_answers_are_right(task: str, count: int, model: TrainedModel, tokenizer: Tokenizer) -> None:
    assert score(model, tokenizer, of(task, count))[task].value >= LEAST[task]


def test_recall_hangs_on_the_indexer(model: TrainedModel, tokenizer: Tokenizer) -> None:
    assert score(model, tokenizer, of("recall", 40), random_choice=True)["recall"].value < 0.5


def test_a_tale_is_predicted_far_better_than_by_chance(model: TrainedModel, tokenizer: Tokenizer) -> None:
    assert score(model, tokenizer, of("english", 4))["english"].value < 80


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_another_seed_reaches_the_scores(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The whole training, an hour on one core: `pytest -m slow tests/exporter/training/test_nano.py`."""
    made = TrainedModel(load_preset("nano").config)
    with Checkpoint.open(train(tmp_path / "another", preset="nano", seed=1, threads=1).path) as source:
        read_weights(made, source)
    for task, least in LEAST.items():
        assert score(made, tokenizer, of(task, 200))[task].value >= least, task
    assert score(made, tokenizer, of("recall", 40), random_choice=True)["recall"].value < 0.5
