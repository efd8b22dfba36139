"""Checkpoints that are trained and come with this package: `configs/checkpoints/<preset>`."""

from __future__ import annotations

import shutil
from pathlib import Path

from seekforge.common.configs import configs_folder
from seekforge.common.errors import ConfigError
from seekforge.common.files import atomic_folder
from seekforge.exporter.checkpoint.new import WrittenCheckpoint, describe
from seekforge.exporter.checkpoint.presets import Preset, load_preset
from seekforge.exporter.checkpoint.schema import expected_tensors


def trained_folder(preset: str) -> Path | None:
    """Return the trained checkpoint of a preset; None: there is none."""
    folder = configs_folder() / "checkpoints" / preset
    return folder if (folder / "config.json").is_file() else None


def copy_trained_checkpoint(out: Path, preset: str | Preset, *, force: bool = False) -> WrittenCheckpoint:
    """Write the trained checkpoint of a preset, with its card and the tasks that it is scored on.

    Args:
        out: the folder to make.
        preset: a name of `configs/models`, or a preset itself.
        force: replace a checkpoint that stands at `out`.

    Raises:
        ConfigError: the preset is unknown, or has no trained weights.
        OutputError: `out` is not empty (without `force`), or cannot be written.
    """
    chosen = load_preset(preset) if isinstance(preset, str) else preset
    source = trained_folder(chosen.name)
    if source is None:
        raise ConfigError(f"preset {chosen.name!r} has no trained weights; its weights are drawn from a seed")
    with atomic_folder(out, force=force, marker="config.json") as folder:
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, folder / path.name)
        return describe(folder, out, expected_tensors(chosen.config))
