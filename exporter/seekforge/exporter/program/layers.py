"""Which part of a model a program holds: a range of layers, a truncated model, and what then lies outside.

A range is a pipeline stage or a layer under test: it keeps the model's absolute layer numbers. A truncated model is
a whole model of fewer layers and real width, with final norm and head behind its last layer: for one small GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from seekforge.common.errors import ConfigError
from seekforge.exporter.models import family_of
from seekforge.formats.checkpoint.model_config import ModelConfig

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def parse_layers(text: str) -> tuple[int, int]:
    """Read `A-B` (both included) or a single `A`; return the half-open range [A, B + 1).

    Raises:
        ConfigError: `text` is neither.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--layers is {text!r}, expected A-B (both included) or one number, such as 0-30")
    first = int(match[1])
    return first, int(match[2] or first) + 1


def check_range(layer_range: tuple[int, int], config: ModelConfig) -> None:
    """Compare a range with the model.

    Raises:
        ConfigError: it is empty or reaches past the last layer.
    """
    start, stop = layer_range
    if not 0 <= start < stop <= config.num_hidden_layers:
        raise ConfigError(
            f"layers {start}-{stop - 1}: expected first <= last within 0-{config.num_hidden_layers - 1}, the layers "
            "of this model (the MTP module goes with the range that holds the last one)"
        )


def truncate(config: ModelConfig, num_layers: int) -> ModelConfig:
    """Return the config of the model's first `num_layers` layers, without an MTP module.

    The MTP module drafts from the hidden state of the last layer, which a truncated model does not have.

    Raises:
        ConfigError: there are not that many layers.
    """
    if not 0 < num_layers <= config.num_hidden_layers:
        raise ConfigError(f"--num-layers is {num_layers}, expected 1 to {config.num_hidden_layers}, the model's layers")
    if num_layers == config.num_hidden_layers:
        return config
    whole = config.model_dump(mode="json")
    changed = {
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": min(config.first_k_dense_replace, num_layers),
    }
    if "indexer_types" in whole:
        changed["indexer_types"] = whole["indexer_types"][:num_layers]
    return ModelConfig.parse(whole | changed, f"the first {num_layers} layers of the model")


def outside(
    names: Iterable[str], config: ModelConfig, *, layer_range: tuple[int, int], has_mtp: bool
) -> dict[str, str]:
    """Return the checkpoint tensors that a program of `layer_range` leaves to others: name -> group.

    A group is `model.layers.7.*` for a layer, or the name of one of the three tensors outside layers.

    Args:
        names: the checkpoint's tensors.
        config: the model that is exported (truncated or not).
        layer_range: [a, b).
        has_mtp: the MTP module is part of the program.
    """
    start, stop = layer_range
    is_last = stop == config.num_hidden_layers
    inside = {*range(start, stop), *([config.mtp_layer] if has_mtp else [])}
    first, last = family_of(config).end_tensors(config)
    ends = {one.name: start == 0 or has_mtp for one in first} | {one.name: is_last for one in last}
    result = {}
    for name in names:
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) not in inside:
            result[name] = f"model.layers.{layer[1]}.*"
        elif not ends.get(name, True):
            result[name] = name
    return result


def count_groups(outside_tensors: dict[str, str]) -> dict[str, int]:
    """Return group -> number of its tensors, in checkpoint order of the layers."""
    counted = Counter(outside_tensors.values())
    return dict(sorted(counted.items(), key=lambda item: [int(p) if p.isdigit() else -1 for p in item[0].split(".")]))
