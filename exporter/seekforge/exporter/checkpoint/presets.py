"""The model presets of `configs/models/*.yaml`: a config.json's keys and how many shards to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seekforge.common.configs import configs_folder, known
from seekforge.common.errors import ConfigError
from seekforge.common.records import Positive, Record, RecordError
from seekforge.common.yaml_file import YamlError, YamlNumberError, read_yaml
from seekforge.formats.checkpoint.model_config import ModelConfig


class _PresetFile(Record):
    num_shards: Positive
    config: dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A model to write.

    Attributes:
        name: file name without `.yaml`.
        num_shards: safetensors files to write.
        config_json: what config.json will hold.
        config: the same, checked.
    """

    name: str
    num_shards: int
    config_json: dict[str, Any]
    config: ModelConfig


def known_presets() -> tuple[str, ...]:
    """Return the names `load_preset` knows, sorted."""
    return tuple(known("models"))


def load_preset(name: str) -> Preset:
    """Read and check a preset.

    Raises:
        ConfigError: there is no such preset, or its file is malformed.
    """
    if name not in known_presets():
        raise ConfigError(f"preset {name!r} is unknown; known presets: {', '.join(known_presets())}")
    return read_preset(configs_folder() / "models" / f"{name}.yaml")


def read_preset(path: Path) -> Preset:
    """Read and check one preset file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has a missing, unknown or malformed key.
    """
    try:
        raw = read_yaml(path)
        file = _PresetFile.model_validate(raw)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except YamlNumberError as error:
        raise ConfigError(f"{path}: {error}") from None
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    except RecordError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Preset(path.stem, file.num_shards, file.config, ModelConfig.parse(file.config, str(path)))
