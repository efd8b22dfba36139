"""What parity sees inside a model of `transformers` with an indexer while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seekforge.exporter.models.shared import oracle


@contextlib.contextmanager
def watch(model: Any) -> Iterator[dict[str, dict[int, Any]]]:
    """Collect per layer what `shared.oracle.watch` does, and the chosen keys."""
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(oracle.watch(model))
        seen["keys"] = {}
        for number, layer in enumerate(model.model.layers):
            if layer.self_attn.indexer is None:  # it shares the choice of an earlier layer
                continue

            def keys(module: Any, args: Any, out: Any, number: int = number) -> None:
                seen["keys"][number] = out.numpy()

            stack.callback(layer.self_attn.indexer.register_forward_hook(keys).remove)
        yield seen


def selections(seen: Mapping[str, Mapping[int, Any]], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what was chosen in the form of our taps.

    topk_indices.N are [B, Q, index_topk] int32: positions that are visible, ascending, then −1.
    """
    keys = {f"topk_indices.{layer}": _padded(chosen, config["index_topk"]) for layer, chosen in seen["keys"].items()}
    return keys | oracle.selections(seen, config)


def _padded(chosen: np.ndarray, index_topk: int) -> np.ndarray:
    rows = chosen.shape[1]
    visible = np.where(chosen <= np.arange(rows)[None, :, None], chosen, rows)
    ordered = np.sort(visible, -1)
    ordered = np.where(ordered == rows, -1, ordered)
    padding = np.full((*ordered.shape[:2], index_topk - ordered.shape[2]), -1)
    return np.concatenate([ordered, padding], -1).astype(np.int32)
