"""The model families, each a folder here: `FAMILIES` says which folder a `model_type` of `config.json` belongs to."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Final

from seekforge.common.errors import ConfigError

if TYPE_CHECKING:
    from seekforge.exporter.models.family import Family
    from seekforge.formats.checkpoint.model_config import ModelConfig

#: `model_type` -> the folder of its family, which exports `FAMILY`.
FAMILIES: Final = {"deepseek_v32": "deepseek_v32", "deepseek_v3": "deepseek_v3", "glm_moe_dsa": "glm_moe_dsa"}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a model.

    Raises:
        ConfigError: nothing is known of its `model_type`.
    """
    return load_family(config.model_type)


@functools.cache
def load_family(model_type: str) -> Family:
    """Return a family by its `model_type`.

    Raises:
        ConfigError: nothing is known of it.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}")
    package = f"{__name__}.{FAMILIES[model_type]}"
    family: Family = importlib.import_module(package).FAMILY
    return family
