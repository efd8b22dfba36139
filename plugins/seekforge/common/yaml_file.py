"""Read YAML as JSON with comments: what a target or a preset needs, with the bounds of `reading`.

PyYAML's own safe loader knows dates (`2001-99-01` is an error inside its constructor), sexagesimal numbers, aliases
that unfold a page into gigabytes, and keys that are lists; of keys named twice it keeps the last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

import yaml

from seekforge.common.reading import read_text

#: Ours have two kilobytes, and PyYAML reads a megabyte in ten seconds.
_MOST_BYTES: Final = 16 << 10
_MAX_DEPTH: Final = 32
_DECIMAL: Final = re.compile(r"[-+]?[0-9][0-9_]*")
_TAGS: Final = ("str", "int", "float", "bool", "null", "seq", "map")


class YamlError(ValueError):
    """A text is no YAML, or holds more than settings do."""


class YamlNumberError(YamlError):
    """A number is none that settings have; `problem` says what without its line."""

    def __init__(self, place: str, value: str, expected: str) -> None:
        super().__init__(f"{place} is {value!r:.60}, expected {expected}")
        self.problem: Final = f"found {value!r:.60}, expected {expected}"


class _Loader(yaml.SafeLoader):
    """Strings, numbers, booleans, null, lists and mappings with text as keys, each once."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise YamlError(f"{_place(self.peek_event())} has an alias, expected plain values")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise YamlError(f"it is nested deeper than {_MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
            raise YamlError(f"{_place(node)} has the type {node.tag.rpartition(':')[2]!r}, expected a plain value")
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
            raise YamlError(f"{_place(node)} holds half of a surrogate pair")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(f"{_place(key_node)} has a key that is no text")
            key = self.construct_object(key_node, deep=deep)
            if key in mapping:
                raise YamlError(f"{_place(key_node)} names {key!r} twice")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def integer(self, node: Any) -> int:
        text = self.construct_scalar(node)
        if not _DECIMAL.fullmatch(text) or len(text) > 40 or abs(value := int(text)) >= 2**63:
            raise YamlNumberError(_place(node), text, "a whole number of at most 64 bits")
        return value

    def real(self, node: Any) -> float:
        text = self.construct_scalar(node)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise YamlNumberError(_place(node), text, "a finite number")
        return value


# dates are text
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# numbers as JSON writes them, 1e6 too, which YAML 1.1 takes for text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real)


def _place(what: Any) -> str:
    return f"line {what.start_mark.line + 1}"


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        YamlError: it is no YAML, or has an alias, a tag, a key twice, a number out of range, or is nested too deep.
    """
    if len(text) > _MOST_BYTES:
        raise YamlError(f"it has {len(text):,} characters, expected at most {_MOST_BYTES:,}")
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except YamlError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:  # of PyYAML's constructors
        raise YamlError(f"a value is not what its tag says, or out of range: {error}") from None
    return value


def read_yaml(path: Path) -> Any:
    """Return the value that a YAML file holds.

    Raises:
        YamlError: as `parse_yaml`, or it is no UTF-8.
        OSError: it cannot be read, is no regular file, or too large; `strerror` says what.
    """
    try:
        text = read_text(path, most=_MOST_BYTES)
    except ValueError as error:
        raise YamlError(str(error)) from None
    return parse_yaml(text)
