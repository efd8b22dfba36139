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


def write_dequantized(checkpoint: Path, out: Path) -> Path:
    """Write an FP32 copy of an FP8 checkpoint, with nothing of ours: safetensors and repeat_interleave.

    transformers 5.24 can dequantize on load, but takes the block height as rows / scale rows: wrong for
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


def load_oracle(dequantized: Path, *, attention: str = "eager") -> Any:
    """Load the FP32 oracle and check that nothing but the MTP layer was left out."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, info = AutoModelForCausalLM.from_pretrained(
        dequantized, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    assert not info["missing_keys"], info["missing_keys"]
    assert all(key.startswith(prefix) for key in info["unexpected_keys"]), info["unexpected_keys"]
    return model.eval()


@contextmanager
def inject_selection(oracle: Any, topk_indices: Sequence[torch.Tensor]):
    """Make the oracle attend to these keys: one [B, Q, k] int tensor with −1 fill per layer."""
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


@contextmanager
def record_selection(oracle: Any):
    """Yield a list that fills with each layer's chosen keys as the oracle runs: [B, Q, k] int, unsorted."""
    chosen: list[torch.Tensor] = []
    saved = [(layer.self_attn.indexer, layer.self_attn.indexer.forward) for layer in oracle.model.layers]
    for indexer, forward in saved:

        def recording(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            chosen.append(result)
            return result

        indexer.forward = recording
    try:
        yield chosen
    finally:
        for indexer, forward in saved:
            indexer.forward = forward


def write_mtp_oracle(checkpoint: Path, out: Path) -> Path:
    """Write the MTP layer as a one-layer model: transformers has no MTP for V3.2.

    Fed `eh_proj([enorm(e) | hnorm(h)])` as `inputs_embeds`, it computes what the MTP module does after that.
    """
    whole = write_dequantized(checkpoint, out / "whole")
    config = json.loads((whole / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers']}."
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        embed, head = file.get_tensor("model.embed_tokens.weight"), file.get_tensor("lm_head.weight")
    combining = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
    extra = {name: tensors.pop(prefix + name) for name in combining}
    result = {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": head,
        "model.norm.weight": tensors.pop(prefix + "shared_head.norm.weight"),
    }
    del tensors[prefix + "embed_tokens.weight"], tensors[prefix + "shared_head.head.weight"]
    result |= {name.replace(prefix, "model.layers.0."): tensor for name, tensor in tensors.items()}
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    folder = out / "mtp"
    folder.mkdir()
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(extra, folder / "combine.st")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mtp_logits(oracle: Any, combine: dict[str, torch.Tensor], ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the composed MTP oracle's logits [B, Q, V] for next tokens `ids` [B, Q] and hidden states [B, Q, H]."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + oracle.config.rms_norm_eps) * weight

    embedded = norm(oracle.model.embed_tokens(ids), combine["enorm.weight"])
    pair = torch.cat([embedded, norm(hidden, combine["hnorm.weight"])], -1)
    return oracle(inputs_embeds=pair @ combine["eh_proj.weight"].T).logits
