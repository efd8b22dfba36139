"""`seekforge.train`: a checkpoint out of nothing but a seed, or a given one trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seekforge.common.errors import ConfigError, OptionError
from seekforge.common.files import atomic_folder, check_vacant
from seekforge.exporter.calls import AnyPath, Count, Flag, NotNegative, Progress, Seed, Threads, public, stages_of
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.checkpoint.source import resolve
from seekforge.exporter.checkpoint.text_files import check_files
from seekforge.exporter.training.examples import read_examples
from seekforge.formats.checkpoint.model_config import ModelConfig

if TYPE_CHECKING:
    from seekforge.exporter.training.loop import Progress as TrainingProgress

#: Presets that can be trained from a seed: what `training.tasks` teaches is made for them.
TRAINED_PRESETS = ("nano",)


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
        checkpoint: train this one on instead, a folder or a repository of the hub; needs `data`.
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
    made = None if preset is None else _trained_preset(preset)
    examples = None if data is None else read_examples(Path(data))
    source = None if checkpoint is None else resolve(checkpoint, quiet=stages.quiet)
    if source is not None:
        ModelConfig.load(source)
        check_files(source)
    # these bring torch
    from seekforge.exporter.training.start import cpu_threads, from_checkpoint, from_seed
    from seekforge.exporter.training.weights import write_checkpoint

    with cpu_threads(threads):
        if made is not None:
            training, tokenizer = from_seed(made, seed, steps, rate)
        else:
            assert source is not None and data is not None and examples is not None
            training, made, tokenizer = from_checkpoint(source, Path(data), examples, seed=seed, steps=steps, rate=rate)
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


def _trained_preset(name: str) -> Preset:
    preset = load_preset(name)
    if name not in TRAINED_PRESETS:
        raise ConfigError(f"preset {name!r} cannot be trained, expected one of: {', '.join(TRAINED_PRESETS)}")
    return preset
