"""Training writes FP8 blocks and BF16, rounds to them in memory as on disk, and refuses to round to other forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seekforge.common.errors import ConfigError
from seekforge.exporter.checkpoint.presets import DTYPES, load_preset, stored_as
from seekforge.exporter.training.initial import initialize
from seekforge.exporter.training.model import TrainedModel
from seekforge.exporter.training.vocabulary import task_tokenizer
from seekforge.exporter.training.weights import check_form, read_weights, round_weights, write_checkpoint
from seekforge.formats.checkpoint.safetensors import Checkpoint


@pytest.mark.parametrize("dtype", ["fp8", *DTYPES])
def test_a_form_that_no_update_is_rounded_to_is_refused(dtype: str) -> None:
    config = stored_as(load_preset("tiny"), dtype).config
    if dtype in ("fp8", "bf16"):
        check_form(config)
        return
    with pytest.raises(ConfigError, match="trained weights are rounded to FP8 blocks or BF16"):
        check_form(config)


def test_weights_are_rounded_to_what_a_checkpoint_of_them_reads_as(tmp_path: Path) -> None:
    preset = load_preset("nano")
    model, read = TrainedModel(preset.config), TrainedModel(preset.config)
    torch.manual_seed(0)
    initialize(model)
    write_checkpoint(tmp_path, model, preset, task_tokenizer(preset.config.vocab_size))
    exact = model.lm_head.detach().clone()
    tensors = round_weights(model)
    with Checkpoint.open(tmp_path) as source:
        read_weights(read, source)
        assert set(tensors) == set(source.names)
    assert not torch.equal(model.lm_head, exact)
    for name, values in read.state_dict().items():
        assert torch.equal(values, model.state_dict()[name]), name
