"""A training goes on from its state to the same weights; what stands beside it is not believed."""

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seekforge.common.errors import OutputError
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.training import loop
from seekforge.exporter.training.batches import TaskData
from seekforge.exporter.training.initial import initialize
from seekforge.exporter.training.loop import Training
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.schedule import Schedule
from seekforge.exporter.training.vocabulary import task_tokenizer
from seekforge.exporter.training.weights import read_weights, write_checkpoint
from seekforge.formats.checkpoint.safetensors import Checkpoint

PRESET = load_preset("nano")
#: Two steps, then rounds of one and two.
ROUNDS = Schedule(steps=5, last_share=3 / 5, num_rows=1, length=32, recall_steps=1, tools_length=64)
SHORT = Schedule(steps=6, num_rows=2, length=64, recall_steps=2, tools_length=96)


def training(schedule: Schedule = SHORT, seed: int = 0) -> Training:
    torch.manual_seed(seed)
    model = TrainedModel(PRESET.config)
    initialize(model)
    tokenizer = task_tokenizer(PRESET.config.vocab_size)
    return Training(model, TaskData(tokenizer, seed), schedule, {"seed": seed})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, dict[str, Any]]:
    """A training after a step, and its state."""
    one = training(Schedule(steps=6, num_rows=1, length=32, recall_steps=2, tools_length=64))
    one.update()
    path = tmp_path_factory.mktemp("saved") / "state"
    one.save(path)
    one.load(path)
    return one, torch.load(path, weights_only=True)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_STEPS", 3)
    state = tmp_path / "state"
    whole = training()
    whole.run(state)
    assert whole.step == 6 and state.exists()
    resumed = training()
    resumed.load(state)
    assert resumed.step == 3
    resumed.run()
    assert resumed.num_tokens == whole.num_tokens
    for name, values in whole.model.state_dict().items():
        assert torch.equal(values, resumed.model.state_dict()[name]), name


def test_a_round_of_the_last_stage_has_its_own_rate_tasks_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule()
    assert (schedule.main_steps, schedule.round_steps, schedule.steps) == (3000, 400, 3800)
    assert [step for step in range(schedule.steps) if schedule.begins_round(step)] == [3000, 3400]
    for step in (3000, 3400):
        assert schedule.factor(step - 1) < 0.03 and schedule.factor(step) == schedule.last_rate
    assert "differences" not in schedule.mixtures(2999)[0][0].weights
    assert schedule.mixtures(3000)[0][0].weights["differences"] > 0
    whole = Schedule(steps=200, last_share=0.0)
    assert whole.main_steps == 200 and not any(whole.begins_round(step) for step in range(200))
    rounded = []
    monkeypatch.setattr(loop, "round_weights", rounded.append)
    one = training(replace(ROUNDS, last_share=1 / 4, steps=4, last_rounds=1))
    optimizers = []
    one.run(report=lambda _: optimizers.append(one.optimizer))
    assert rounded == [one.model] and optimizers[1] is optimizers[2] is not optimizers[3]


def test_rounds_divide_the_last_stage_whatever_its_length() -> None:
    schedule = Schedule(steps=20, last_share=11 / 20, last_rounds=3)
    assert [step for step in range(20) if schedule.begins_round(step)] == [9, 12, 15]
    rates = [schedule.factor(step) for step in range(15, 20)]
    assert rates == sorted(rates, reverse=True) and rates[0] == schedule.last_rate


def test_a_round_on_a_checkpoint_is_the_round_of_the_whole_training(tmp_path: Path) -> None:
    whole, begun = training(ROUNDS), training(ROUNDS)
    whole.run()
    while begun.step < 3:
        begun.update()
    write_checkpoint(tmp_path, begun.model, PRESET, task_tokenizer(PRESET.config.vocab_size))
    rest = training(ROUNDS)
    with Checkpoint.open(tmp_path) as source:
        read_weights(rest.model, source)
    rest.step = 3
    rest.run()
    for name, values in whole.model.state_dict().items():
        assert torch.equal(values, rest.model.state_dict()[name]), name


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path) -> None:
    one = training(Schedule(steps=40, last_share=0.0, num_rows=3, length=192, recall_steps=40))
    losses = []
    one.run(report=lambda progress: losses.append(progress.next_token))
    assert sum(losses[-5:]) / 5 < 0.5 * sum(losses[:5]) / 5


def test_a_state_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """On a full disk too: nothing of torch's writes into the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match=r"state: cannot be written \(File too large\)"):
            training().save(tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    training().save(tmp_path / "state")
    with pytest.raises(OutputError, match="state of a training with other settings; repeat those, or delete it"):
        training(seed=1).load(tmp_path / "state")


def test_what_is_no_state_is_refused_in_a_line(tmp_path: Path) -> None:
    """Whatever torch's reader of it ends in."""
    one, state = training(), tmp_path / "state"
    for content in (b"", b"no state", b"PK\3\4 cut", b"\x80\x02a.", b"\x80\x02\x8a", b"\x80\x02K\x01.", b"\x80\x02}."):
        state.write_bytes(content)
        with pytest.raises(OutputError, match="is no state of a training; delete it to begin anew"):
            one.load(state)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(OutputError, match="is no state of a training"):
        one.load(state)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step",), -1),
        (("step",), "six"),
        (("num_tokens",), None),
        (("model",), []),
        (("optimizer",), 5),
        (("optimizer", "momenta"), {}),
        (("optimizer", "momenta", "layers.0.self_attn.q_a_proj"), torch.zeros(2, 2)),
        (("optimizer", "adam", "state", 0), {"step": torch.zeros(()), "exp_avg": torch.zeros(1)}),
        (("optimizer", "adam", "state", 0), None),
    ],
)
def test_a_state_with_a_damaged_value_is_refused_in_a_line(
    place: tuple[Any, ...], value: object, saved: tuple[Training, dict[str, Any]], tmp_path: Path
) -> None:
    one, state = saved
    kept = copied = {**state}
    for name in place[:-1]:
        copied[name] = {**copied[name]}
        copied = copied[name]
    assert place[-1] in copied
    copied[place[-1]] = value
    torch.save(kept, tmp_path / "state")
    with pytest.raises(OutputError, match="state: is damaged; delete it to begin anew"):
        one.load(tmp_path / "state")
