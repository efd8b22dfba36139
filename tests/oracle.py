"""`transformers`' DeepSeek-V3.2 in FP32 as an independent oracle for our model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_dequantised(checkpoint: Path, out: Path) -> Path:
    """Write an FP32 copy of an FP8 checkpoint, with nothing of ours: safetensors and repeat_interleave.

    transformers 5.24 can dequantise on load, but takes the block height as rows / scale rows: wrong for
    `kv_a_proj_with_mqa`, whose last block is part full (192 rows in 2 blocks: 96 instead of 128).
    """
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale_inv"]
            blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            value = value * blocks[: value.shape[0], : value.shape[1]]
        result[name] = value.contiguous()
    out.mkdir(parents=True)
    save_file(result, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    config["torch_dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))
    return out


def load_oracle(dequantised: Path) -> Any:
    """Load the FP32 oracle and check that nothing but the MTP layer was left out."""
    from transformers import DeepseekV32ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, info = DeepseekV32ForCausalLM.from_pretrained(
        dequantised, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    assert not info["missing_keys"], info["missing_keys"]
    assert all(key.startswith(prefix) for key in info["unexpected_keys"]), info["unexpected_keys"]
    return model.eval()


@contextmanager
def inject_selection(oracle: Any, topk_indices: Sequence[torch.Tensor]):
    """Make the oracle attend to given keys: one [B, Q, k] int tensor with −1 fill per layer."""
    saved: list[tuple[Any, Callable[..., Any]]] = []
    for layer, chosen in zip(oracle.model.layers, topk_indices, strict=True):
        indexer = layer.self_attn.indexer
        # its mask is a scatter of these positions: a repeat is harmless, −1 is not
        filled = torch.where(chosen < 0, chosen[..., :1], chosen).long()
        saved.append((indexer, indexer.forward))
        indexer.forward = lambda *args, filled=filled, **kwargs: filled
    try:
        yield
    finally:
        for indexer, forward in saved:
            indexer.forward = forward
