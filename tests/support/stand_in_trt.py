"""What `plugins/tensorrt/plugin.py` needs of TensorRT's module, where none is installed: bases, names, a registry.

The graph walker uses the real module where there is one. This one lets a machine with a GPU and without TensorRT run
the very plugin class: fields, attributes and pointers go the same way, only the base classes are empty.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__version__ = "stand-in"


class IPluginV3:
    """Empty base."""


class IPluginV3OneCore:
    """Empty base."""


class IPluginV3OneBuild:
    """Empty base."""


class IPluginV3OneBuildV2:
    """Empty base."""


class IPluginV3OneRuntime:
    """Empty base."""


class IPluginCreatorV3One:
    """Empty base."""


#: Names that the plugin looks up.
DataType = enum.Enum("DataType", ["FLOAT", "BF16", "FP8", "INT8", "INT32", "INT64"])
PluginFieldType = enum.Enum("PluginFieldType", ["CHAR", "FLOAT32", "INT32"])
TensorRTPhase = enum.Enum("TensorRTPhase", ["BUILD", "RUNTIME"])


@dataclass(frozen=True)
class PluginField:
    """One attribute as TensorRT carries it."""

    name: str
    data: Any
    type: Any


def PluginFieldCollection(fields: Iterable[PluginField]) -> list[PluginField]:
    """The fields of one plugin."""
    return list(fields)


class _Registry:
    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = creator.name, creator.plugin_version, namespace
        return self._creators.setdefault(key, creator) is creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self._creators.get((name, version, namespace))


_REGISTRY = _Registry()


def get_plugin_registry() -> _Registry:
    """The one registry of the process."""
    return _REGISTRY
