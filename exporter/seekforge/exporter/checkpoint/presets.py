"""The model presets of `configs/models/*.yaml`: a config.json's keys and how many shards to write."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from seekforge.common.configs import configs_folder, known
from seekforge.common.errors import ConfigError
from seekforge.common.records import Positive, Record, RecordError
from seekforge.common.yaml_file import YamlError, YamlNumberError, read_yaml
from seekforge.exporter.models.shared.parameters import ATTENTION, HEAD, ROUTER
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


#: What `new-checkpoint --dtype` names -> what config.json says of weights that are held so, in its writer's words.
_MODELOPT_LEFT_OUT: Final = [HEAD, f"model.layers.*.{ATTENTION}*"]
_CT_LEFT_OUT: Final = [HEAD, f"re:.*{re.escape(ROUTER)}$"]


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": _CT_LEFT_OUT,
    }


DTYPES: Final[dict[str, dict[str, Any] | None]] = {
    "bf16": None,
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": _MODELOPT_LEFT_OUT},
    "fp8-tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": [HEAD]},
    "ct-nvfp4": _compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
    "ct-fp8-blocks": _compressed(
        "float-quantized", type="float", num_bits=8, strategy="block", block_structure=[128, 128]
    ),
    "ct-fp8-channel": _compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
    "ct-fp8-tensor": _compressed("float-quantized", type="float", num_bits=8, strategy="tensor"),
}


def stored_as(preset: Preset, dtype: str) -> Preset:
    """Return a preset whose checkpoint holds its matrices as one of `DTYPES`, or as the preset says (`fp8`).

    Raises:
        ConfigError: `dtype` is none of them.
    """
    if dtype == "fp8":
        return preset
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; known: fp8, {', '.join(DTYPES)}")
    raw = {key: value for key, value in preset.config_json.items() if key != "quantization_config"}
    raw |= {} if DTYPES[dtype] is None else {"quantization_config": DTYPES[dtype]}
    return replace(preset, config_json=raw, config=ModelConfig.parse(raw, f"preset {preset.name}, dtype {dtype}"))


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
