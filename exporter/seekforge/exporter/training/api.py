"""`seekforge.train`: a checkpoint out of nothing but a seed, or a given one trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from seekforge.common.errors import CheckpointError, ConfigError, OptionError
from seekforge.common.files import atomic_folder, check_vacant, sha256_file
from seekforge.common.reading import read_json
from seekforge.exporter.calls import AnyPath, Count, Flag, NotNegative, Progress, Seed, Threads, public, stages_of
from seekforge.exporter.checkpoint.opened import open_checkpoint
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.training.batches import TaskData
from seekforge.exporter.training.examples import ExampleData, read_examples
from seekforge.exporter.training.initial import initialize
from seekforge.exporter.training.loop import Progress as TrainingProgress
from seekforge.exporter.training.loop import Training
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.schedule import Schedule
from seekforge.exporter.training.vocabulary import task_tokenizer
from seekforge.exporter.training.weights import read_weights, write_checkpoint

#: Presets that can be trained from a seed: what `training.tasks` teaches is made for them.
TRAINED_PRESETS = ("nano",)
#: Learning rates of fine-tuning, of those of a training from a seed.
_FINE_TUNING_RATE = 0.05


@dataclass(frozen=True)
class TrainResult:
    """A checkpoint that was trained.

    Attributes:
        path: its folder.
        steps: updates in all.
        num_tokens: tokens seen in all.
        resumed_from: the step that an interrupted training went on from; 0: none.
        loss: the mean next-token loss of the last steps, nats.
        seconds: how long each stage of the work took.
    """

    path: Path
    steps: int
    num_tokens: int
    resumed_from: int
    loss: float
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return what `seekforge train --json` prints."""
        return asdict(self) | {"path": str(self.path)}


@public
def train(
    out: AnyPath,
    *,
    preset: str | None = None,
    checkpoint: AnyPath | None = None,
    data: AnyPath | None = None,
    seed: Seed = 0,
    steps: Count | None = None,
    rate: NotNegative = 1.0,
    threads: Threads | None = None,
    force: Flag = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a checkpoint: a preset from a seed, or a given checkpoint on examples of one's own.

    While it runs its state is kept beside `out`, as `<out>.state`; the same call goes on from there, to the same
    weights. Of a checkpoint that is trained on, attention is sparse from the beginning.

    Args:
        out: the folder to make.
        preset: train this preset from nothing ("nano").
        checkpoint: train this folder on instead; needs `data`.
        data: JSONL of examples: {"prompt", "completion"} or {"text"} in each line.
        seed: the seed of the first weights and of all that is drawn.
        steps: updates; None: those of the preset, or 200 on a checkpoint.
        rate: factor on the learning rates.
        threads: CPU threads; None: torch's own choice.
        force: replace a checkpoint that stands at `out`.
        progress: told each stage.

    Raises:
        OptionError: neither or both of preset and checkpoint, or data without a checkpoint.
        ConfigError, CheckpointError: the preset, the checkpoint or the examples are not what is expected.
        OutputError: `out` or its state cannot be written, or a state beside it is of another training.
    """
    if (preset is None) == (checkpoint is None):
        raise OptionError("train takes a preset or a checkpoint, expected one of them")
    if (checkpoint is None) != (data is None):
        raise OptionError("a checkpoint is trained on examples: pass --checkpoint and --data together")
    stages, folder_out = stages_of(progress), Path(out)
    stages("prepare")
    check_vacant(folder_out, force=force, marker="config.json")
    with _threads(threads):
        if preset is not None:
            training, made, tokenizer = _from_seed(preset, seed, steps, rate)
        else:
            assert checkpoint is not None and data is not None
            training, made, tokenizer = _from_checkpoint(Path(checkpoint), Path(data), seed, steps, rate)
        state = folder_out.with_name(f"{folder_out.name}.state")
        if state.exists():
            training.load(state)
        resumed_from, losses = training.step, []
        with stages.steps_bar("train") as bar:

            def report(one: TrainingProgress) -> None:
                losses.append(one.next_token)
                bar(one.step / training.schedule.steps)

            training.run(state, report)
        stages("write weights")
        with atomic_folder(folder_out, force=force, marker="config.json") as folder:
            write_checkpoint(folder, training.model, made, tokenizer)
    state.unlink(missing_ok=True)
    stages.done()
    last = losses[-50:]
    return TrainResult(
        path=folder_out,
        steps=training.step,
        num_tokens=training.num_tokens,
        resumed_from=resumed_from,
        loss=sum(last) / len(last) if last else 0.0,
        seconds=dict(stages.seconds),
    )


def _from_seed(name: str, seed: int, steps: int | None, rate: float) -> tuple[Training, Preset, Tokenizer]:
    preset = load_preset(name)
    if name not in TRAINED_PRESETS:
        raise ConfigError(f"preset {name!r} cannot be trained, expected one of: {', '.join(TRAINED_PRESETS)}")
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
    return Training(model, TaskData(tokenizer, seed), schedule, {"preset": name, "seed": seed}), preset, tokenizer


def _from_checkpoint(
    folder: Path, data: Path, seed: int, steps: int | None, rate: float
) -> tuple[Training, Preset, Tokenizer]:
    examples = read_examples(data)
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
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library has no other class for what it cannot read
        raise CheckpointError(f"{folder / 'tokenizer.json'}: cannot be read ({error}); download it again") from None
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: has {tokenizer.get_vocab_size()} ids, expected {vocab_size} at most"
        )
    return tokenizer


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
