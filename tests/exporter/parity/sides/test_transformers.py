"""transformers is given the plain form of a checkpoint, whichever form people have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from seekforge.exporter.parity.inputs import open_source
from seekforge.exporter.parity.sides.transformers import _load
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.checkpoint.shard_index import INDEX_FILE
from seekforge.formats.checkpoint.shard_writer import write_shard


def test_whole_numbers_and_other_forms_load_as_the_plain_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers insists on floats; the folder has integers, scales in E8M0 and buffers that are left over."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    for folder in (plain, other):
        shutil.copytree(tiny_checkpoint, folder)
        raw = json.loads((folder / "config.json").read_text())
        raw["routed_scaling_factor"] = 3.0
        if folder == other:
            raw |= {"routed_scaling_factor": 3, "attention_dropout": 0, "initializer_range": 1}
            raw["rope_scaling"] |= {"factor": 40, "mscale": 1, "mscale_all_dim": 1, "rope_type": "yarn"}
        (folder / "config.json").write_text(json.dumps(raw))
    with Checkpoint.open(other) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e8m0fnu)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
        for path in (*other.glob("*.safetensors"), other / INDEX_FILE):
            path.unlink()
        write_shard(other / "model.safetensors", tensors)
    states = []
    for folder in (plain, other):
        work = tmp_path / f"{folder.name}-work"
        work.mkdir()
        with open_source(folder, ModelConfig.load(folder)) as source:
            model, config = _load(folder, source, work)
        assert type(config["routed_scaling_factor"]) is float
        states.append(model.state_dict())
    first, second = states
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
