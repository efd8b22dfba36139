"""The model that is trained is the one that is exported: the same logits, drafts and choices from the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from seekforge.exporter.checkpoint.new import new_checkpoint
from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.checkpoint.tokenizer import train_tokenizer
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.weights import named_tensors, read_weights, write_checkpoint
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import EXACT
from seekforge.formats.step_io import MTP, lay_out

PRESET = load_preset("nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("nano") / "checkpoint", PRESET, seed=1).path


def test_logits_are_those_of_the_exported_model(folder: Path) -> None:
    ids = torch.randint(0, PRESET.config.vocab_size, (1, 3 * PRESET.config.index_topk), generator=torch.Generator())
    with Checkpoint.open(folder) as source, torch.no_grad():
        model = TrainedModel(PRESET.config)
        read_weights(model, source)
        reference = TorchSession(Settings(PRESET.config, EXACT), source).prefill(ids[0].tolist())
        context = model.context(torch.zeros_like(ids), sparse=True)
        hidden = model.hidden(ids, context)
        torch.testing.assert_close(F.linear(hidden[0], model.lm_head), reference["logits"], rtol=0, atol=5e-5)
        torch.testing.assert_close(hidden, reference["hidden"], rtol=0, atol=2e-5)


def test_another_choice_of_keys_gives_other_logits(folder: Path) -> None:
    ids = torch.randint(0, PRESET.config.vocab_size, (1, 3 * PRESET.config.index_topk), generator=torch.Generator())
    with Checkpoint.open(folder) as source, torch.no_grad():
        model = TrainedModel(PRESET.config)
        read_weights(model, source)
        chosen = model.hidden(ids, model.context(torch.zeros_like(ids), sparse=True))
        dense = model.hidden(ids, model.context(torch.zeros_like(ids), sparse=False))
        by_chance = model.context(torch.zeros_like(ids), sparse=True)
        by_chance.random_choice = torch.Generator().manual_seed(0)
        scattered = model.hidden(ids, by_chance)
    topk = PRESET.config.index_topk
    torch.testing.assert_close(chosen[:, :topk], dense[:, :topk], rtol=0, atol=2e-5)
    assert (chosen - dense)[:, topk:].abs().max() > 0.1 and (chosen - scattered)[:, topk:].abs().max() > 0.1


def test_documents_in_a_row_do_not_see_each_other(folder: Path) -> None:
    torch.manual_seed(0)
    model = TrainedModel(PRESET.config)
    ids = torch.randint(0, PRESET.config.vocab_size, (1, 90))
    documents = (torch.arange(90) >= 50).long().unsqueeze(0)
    with torch.no_grad():
        packed = model.hidden(ids, model.context(documents, sparse=True))[:, 50:]
        alone = model.hidden(ids[:, 50:], model.context(documents[:, 50:], sparse=True))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-3)


def test_weights_come_back_from_a_checkpoint_as_they_were_rounded(folder: Path, tmp_path: Path) -> None:
    with Checkpoint.open(folder) as source:
        model = TrainedModel(PRESET.config)
        read_weights(model, source)
        before = {name: view.clone() for name, view in named_tensors(model)}
        write_checkpoint(tmp_path, model, PRESET, train_tokenizer(PRESET.config.vocab_size))
        with Checkpoint.open(tmp_path) as written:
            assert set(written.names) == set(source.names)
            read_weights(model, written)
    after = dict(named_tensors(model))
    assert [name for name, values in before.items() if not torch.equal(values, after[name])] == []


def test_drafts_are_those_of_the_exported_module(folder: Path) -> None:
    ids = torch.randint(0, PRESET.config.vocab_size, (1, 41), generator=torch.Generator())
    with Checkpoint.open(folder) as source, torch.no_grad():
        model = TrainedModel(PRESET.config)
        read_weights(model, source)
        session = TorchSession(Settings(PRESET.config, EXACT), source)
        hidden = session.prefill(ids[0, :-1].tolist())["hidden"]
        session.module(MTP)
        session.allocate_caches(2)
        step = lay_out([ids[0, 1:].tolist()], [0], [range(1, 2)])
        reference = session.run(replace(step, hidden_in=hidden.numpy()), graph=MTP)
        context = model.context(torch.zeros_like(ids[:, :-1]), sparse=True)
        drafted = model.draft(hidden, ids[:, 1:], context)
    torch.testing.assert_close(drafted, reference["hidden"], rtol=0, atol=2e-5)
