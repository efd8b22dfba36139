"""A checkpoint and the config that its tensors have: what every command opens that needs both.

`config.json` and the tensors of a folder do not always agree on what is left out: transformers drops the MTP layer
when it saves and keeps `num_nextn_predict_layers`, other tools keep the layer and say 0. Which of it is there is seen
here, once, so that export, build and parity compute the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from seekforge.exporter.checkpoint.schema import needless_tensors
from seekforge.exporter.checkpoint.validate import check_structure
from seekforge.exporter.models import family_of
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint


@dataclass(frozen=True)
class Opened:
    """An open checkpoint.

    Attributes:
        checkpoint: its tensors; closed with the block that opened it.
        config: the configuration, with `num_nextn_predict_layers` as the tensors are.
        notes: a sentence for each thing that was taken for granted.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    notes: tuple[str, ...]


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Opened]:
    """Open a folder with config.json and shards. Reads headers only.

    Args:
        folder: a checkpoint.

    Raises:
        ConfigError, CheckpointError: it is not what a model of its type needs.
    """
    config, notes = ModelConfig.read(folder)
    with Checkpoint.open(folder) as checkpoint:
        yield see(checkpoint, config, notes)


def see(checkpoint: Checkpoint, config: ModelConfig, notes: tuple[str, ...]) -> Opened:
    """Compare the tensors with their config, and the config with the tensors."""
    config, more = as_stored(checkpoint, config)
    check_structure(checkpoint, config)
    return Opened(checkpoint, config, (*notes, *more))


def as_stored(checkpoint: Checkpoint, config: ModelConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the config without an MTP layer that has no tensors, and a sentence for what is passed over."""
    layer = config.mtp_layer
    prefix = f"model.layers.{layer}."
    marks = tuple(f".{name}" for name in family_of(config).mtp_only(config))  # of any, where the config is another's
    if layer is not None and not any(name.startswith(prefix) or name.endswith(marks) for name in checkpoint.names):
        note = (
            f"num_nextn_predict_layers is 1 and there is no tensor of layer {layer}: the model is taken without its "
            "MTP layer, and cannot draft"
        )
        return config.model_copy(update={"num_nextn_predict_layers": 0}), (note,)
    reasons = Counter(needless_tensors(checkpoint.names).values())
    return config, tuple(f"{count} tensors are passed over, {reason}" for reason, count in reasons.items())
