"""Small models of every family whose checkpoints hold weights in other forms, and those weights read independently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from seekforge.exporter.checkpoint.presets import Preset, load_preset, stored_as
from seekforge.formats.checkpoint.model_config import ModelConfig

#: The values of the four bits of e2m1, sign last.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def two_layers(name: str, dtype: str) -> Preset:
    """Return a preset cut to a dense layer and one of experts, without MTP, whose checkpoint holds `dtype`."""
    whole = load_preset(name)
    raw = dict(whole.config_json) | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "n_routed_experts": 8}
    raw |= {"first_k_dense_replace": 1, "vocab_size": 1024}
    if "indexer_types" in raw:
        raw["indexer_types"] = ["full", "shared"]
    short = replace(whole, num_shards=1, config_json=raw, config=ModelConfig.parse(raw, name))
    return stored_as(short, dtype)


def write_wide(checkpoint: Path, out: Path) -> Path:
    """Write an FP32 copy of a checkpoint of any form for transformers, with nothing of ours but file names."""
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
    wide = {name: wide_weight(stored, name) for name in stored if not _is_scale(name)}
    out.mkdir(parents=True)
    tensors = {name.removesuffix("_packed"): value.contiguous() for name, value in wide.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    config["torch_dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))
    return out


def _is_scale(name: str) -> bool:
    return "_scale" in name.rpartition(".")[2]


def wide_weight(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the f32 values of a stored tensor by the words of its format."""
    value = stored[name]
    if value.dtype == torch.uint8:
        bits = torch.stack((value & 15, value >> 4), -1).flatten(-2).long()
        base = name.removesuffix("_packed")
        steps = stored[f"{base}_scale"].float()
        steps = (
            steps * stored[f"{base}_scale_2"] if f"{base}_scale_2" in stored else steps / stored[f"{base}_global_scale"]
        )
        return _E2M1[bits] * steps.repeat_interleave(16, -1)
    if value.dtype != torch.float8_e4m3fn:
        return value.float()
    inverse = f"{name}_scale_inv"
    scale = (stored[inverse] if inverse in stored else stored[f"{name}_scale"]).float()
    if scale.dim() == 2 and scale.shape[0] != value.shape[0]:  # of blocks, not of rows
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
    return value.float() * scale
