"""What parity sees inside a model of `transformers` while it runs, of all families."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def watch(model: Any) -> Iterator[dict[str, dict[int, Any]]]:
    """Collect per layer the stream before and behind the MLP, and the chosen experts."""
    seen: dict[str, dict[int, Any]] = {"stream": {}, "experts": {}}
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

            def experts(module: Any, args: Any, out: Any, number: int = number) -> None:
                seen["experts"][number] = out[2].numpy()

            hooks = [
                layer.post_attention_layernorm.register_forward_pre_hook(before),
                layer.register_forward_hook(behind),
            ]
            if hasattr(layer.mlp, "gate"):
                hooks.append(layer.mlp.gate.register_forward_hook(experts))
            for hook in hooks:
                stack.callback(hook.remove)
        yield seen


def selections(seen: Mapping[str, Mapping[int, Any]], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what was chosen in the form of our taps: expert_ids.N [B·Q, num_experts_per_tok] int32."""
    return {
        f"expert_ids.{layer}": chosen.reshape(-1, chosen.shape[-1]).astype(np.int32)
        for layer, chosen in seen["experts"].items()
    }
