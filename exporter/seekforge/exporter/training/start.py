"""How a training begins: a model, its data and its schedule, out of a seed or a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from seekforge.common.errors import CheckpointError, ConfigError
from seekforge.common.files import sha256_file
from seekforge.common.reading import read_json
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.presets import Preset
from seekforge.exporter.training.batches import ExampleData, TaskData
from seekforge.exporter.training.initial import initialize
from seekforge.exporter.training.loop import Training
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.schedule import Schedule
from seekforge.exporter.training.tasks import Example
from seekforge.exporter.training.vocabulary import task_tokenizer
from seekforge.exporter.training.weights import read_weights
from seekforge.formats.checkpoint.tokenizer_file import read_tokenizer

#: Learning rates of fine-tuning, of those of a training from a seed.
_FINE_TUNING_RATE = 0.05


def from_seed(preset: Preset, seed: int, steps: int | None, rate: float) -> tuple[Training, Tokenizer]:
    """Return a training of a preset and its tokenizer; arguments as of `train`."""
    torch.manual_seed(seed)
    model = TrainedModel(preset.config)
    initialize(model)
    tokenizer = task_tokenizer(preset.config.vocab_size)
    schedule = Schedule()
    schedule = replace(
        schedule,
        steps=steps or schedule.steps,
        matrix_rate=schedule.matrix_rate * rate,
        other_rate=schedule.other_rate * rate,
    )
    return Training(model, TaskData(tokenizer, seed), schedule, {"preset": preset.name, "seed": seed}), tokenizer


def from_checkpoint(
    folder: Path, data: Path, examples: list[Example], *, seed: int, steps: int | None, rate: float
) -> tuple[Training, Preset, Tokenizer]:
    """Return a training of the checkpoint in `folder` on the examples of `data`, its form and its tokenizer."""
    with open_checkpoint(folder) as opened:
        config = opened.config
        if config.model_type != "deepseek_v32":
            raise ConfigError(f"{folder}: model_type is {config.model_type!r}, training does 'deepseek_v32'")
        model = TrainedModel(config)
        read_weights(model, opened.checkpoint)
        num_shards = len(opened.checkpoint.shards)
    tokenizer = _tokenizer(folder, config.vocab_size)
    schedule = Schedule(
        steps=steps or 200,
        last_share=0.0,
        matrix_rate=Schedule.matrix_rate * _FINE_TUNING_RATE * rate,
        other_rate=Schedule.other_rate * _FINE_TUNING_RATE * rate,
        sparse_from=0.0,
        recall_steps=0,
        held_steps=0,
        slow_rate=1.0,
    )
    drawn = ExampleData(tokenizer, examples, seed)
    drawn.check(schedule)
    key = {"checkpoint": sha256_file(folder / "config.json"), "data": sha256_file(data), "seed": seed}
    config_json = read_json(folder / "config.json")
    return Training(model, drawn, schedule, key), Preset(folder.name, num_shards, config_json, config), tokenizer


def _tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer(path, error=CheckpointError, again="take the tokenizer.json of the checkpoint")
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(f"{path}: has {tokenizer.get_vocab_size()} ids, expected {vocab_size} at most")
    return tokenizer


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch have `count` threads meanwhile; None: its own choice."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
