"""The planted heads are of use from the first step on, whatever the seed: the token behind an equal one is said."""

import pytest
import torch

from seekforge.exporter.checkpoint.presets import load_preset
from seekforge.exporter.training.initial import initialize
from seekforge.exporter.training.model import TrainedModel


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_text_said_twice_is_known(seed: int, sparse: bool) -> None:
    torch.manual_seed(seed)
    model = TrainedModel(load_preset("nano").config)
    initialize(model)
    once = torch.stack([torch.randperm(model.config.vocab_size)[:60] for _ in range(4)])
    ids = torch.cat([once, once], 1)
    with torch.no_grad():
        logits = model.hidden(ids, model.context(torch.zeros_like(ids), sparse=sparse)) @ model.lm_head.T
    logits.scatter_(2, ids.unsqueeze(2), -torch.inf)  # the output begins as the embedding, so a token says itself
    said = logits.argmax(-1)
    assert (said[:, 60:-1] == ids[:, 61:]).float().mean() > 0.5
