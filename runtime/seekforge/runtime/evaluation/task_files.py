"""What task files ask for, read before lm-evaluation-harness makes anything of them.

A task file of the harness may name Python functions (`!function`), which are run while the task is loaded, data that is
downloaded, and metrics whose code is downloaded. Nothing of that happens unasked: this module says what a file wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from seekforge.common.errors import RequestError
from seekforge.common.paths import real_path
from seekforge.common.reading import read_text

#: Loaders of files that the library `datasets` itself has; another name is a folder here or a repository of the hub.
LOCAL_LOADERS: Final = frozenset({"arrow", "csv", "json", "parquet", "text", "xml"})
#: One that reads pickles, which run what they hold.
UNSAFE_LOADER: Final = "pandas"
_FUNCTION: Final = "!function"
#: The harness's own have some kilobytes, and PyYAML reads a megabyte in ten seconds.
_MOST_BYTES: Final = 256 << 10


@dataclass(frozen=True)
class TaskFile:
    """One file, with those that it includes.

    Attributes:
        path: the file.
        functions: Python functions that it names.
    """

    path: Path
    functions: tuple[str, ...]


def read_task_file(path: Path) -> TaskFile:
    """Return which functions a task file, and the files that it includes, would run. Nothing is run.

    Raises:
        RequestError: a file cannot be read or is no YAML.
    """
    functions: list[str] = []
    waiting, seen = [path], set[Path]()
    while waiting:
        one = real_path(waiting.pop())
        if one in seen:
            continue
        seen.add(one)
        try:
            root = yaml.compose(read_text(one, most=_MOST_BYTES), yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise RequestError(f"{one}: {reason}; a task is a YAML file of lm-evaluation-harness") from None
        for node in _nodes(root):
            if node.tag == _FUNCTION:
                functions.append(str(node.value))
        waiting += [one.parent / name for name in _included(root)]
    return TaskFile(path, tuple(functions))


def needs_download(config: Mapping[str, Any]) -> str | None:
    """Return what of a task's data would be downloaded; None where all of it lies here.

    Args:
        config: the keys of a task.
    """
    source = config.get("dataset_path")
    if not isinstance(source, str):
        return None
    if source not in (*LOCAL_LOADERS, UNSAFE_LOADER) and not Path(source).exists():
        return source
    return next((one for one in _texts(config.get("dataset_kwargs")) if "://" in one), None)


def tasks_inside(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a task's keys, and those of the tasks that a group of tasks holds written out."""
    yield config
    inner = config.get("task")
    for one in inner if isinstance(inner, list) else ():
        if isinstance(one, Mapping):
            yield from tasks_inside(one)


def members(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of tasks that a group has, at any depth."""
    for one in tasks_inside(config):
        inner = one.get("task")
        if isinstance(inner, list):
            yield from (name for name in inner if isinstance(name, str))
        elif isinstance(inner, str) and one is not config:
            yield inner


def metrics(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the metrics that a task names, and whether each is asked of the library `evaluate`, which loads code."""
    for one in config.get("metric_list") or ():
        if isinstance(one, Mapping) and isinstance(one.get("metric"), str):
            yield one["metric"], one.get("hf_evaluate") is True


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias is the node itself
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _included(root: yaml.Node | None) -> list[str]:
    if not isinstance(root, yaml.MappingNode):
        return []
    names: list[str] = []
    for key, value in root.value:
        if key.value == "include":
            names += [one.value for one in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
    return names


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
