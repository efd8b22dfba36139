"""What parity needs of `transformers`' DeepSeek-V3.2: its class, and what is seen inside while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def model_class() -> Any:
    """Return the class, which has `from_pretrained`."""
    from transformers import DeepseekV32ForCausalLM

    return DeepseekV32ForCausalLM


def topk_indices(chosen: np.ndarray, rows: int, config: Mapping[str, Any]) -> np.ndarray:
    """Return [B, Q, index_topk] int32 in the form of our tap: positions that are visible, ascending, then −1."""
    visible = np.where(chosen <= np.arange(rows)[None, :, None], chosen, rows)
    ordered = np.sort(visible, -1)
    ordered = np.where(ordered == rows, -1, ordered)
    padding = np.full((*ordered.shape[:2], int(config["index_topk"]) - ordered.shape[2]), -1)
    return np.concatenate([ordered, padding], -1).astype(np.int32)


@contextlib.contextmanager
def watch(model: Any) -> Iterator[dict[str, dict[int, Any]]]:
    """Collect per layer the stream before and behind the MLP, the chosen keys and the chosen experts."""
    seen: dict[str, dict[int, Any]] = {"stream": {}, "keys": {}, "experts": {}}
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):
            middle: dict[str, torch.Tensor] = {}

            def before(module: Any, args: Any, middle: dict[str, torch.Tensor] = middle) -> None:
                middle["x"] = args[0]

            def behind(
                module: Any,
                args: Any,
                out: Any,
                number: int = number,
                middle: dict[str, torch.Tensor] = middle,
            ) -> None:
                seen["stream"][number] = (middle["x"], out[0] if isinstance(out, tuple) else out)

            def keys(module: Any, args: Any, out: Any, number: int = number) -> None:
                seen["keys"][number] = out.numpy()

            def experts(module: Any, args: Any, out: Any, number: int = number) -> None:
                seen["experts"][number] = out[2].numpy()

            hooks = [
                layer.post_attention_layernorm.register_forward_pre_hook(before),
                layer.register_forward_hook(behind),
            ]
            if hasattr(layer.self_attn, "indexer"):
                hooks.append(layer.self_attn.indexer.register_forward_hook(keys))
            if hasattr(layer.mlp, "gate"):
                hooks.append(layer.mlp.gate.register_forward_hook(experts))
            for hook in hooks:
                stack.callback(hook.remove)
        yield seen
