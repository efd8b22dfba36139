"""Find the data files of `configs/`: beside the source tree, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seekforge.common.errors import ConfigError
from seekforge.common.yaml_file import read_yaml


def configs_folder() -> Path:
    """Return the folder that holds `models/` and `targets/`."""
    here = Path(__file__).resolve()
    # an editable install does not copy data: look in the tree first, then in seekforge/configs of a wheel
    for folder in (here.parents[3] / "configs", here.parents[1] / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no configs folder near {here}; reinstall seekforge")


def known(kind: str) -> list[str]:
    """Return the names of one kind (`models` or `targets`), sorted."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.yaml"))


def load_yaml(kind: str, name: str) -> Any | None:
    """Return the decoded file, or None when there is no such name."""
    if name not in known(kind):
        return None
    return read_yaml(configs_folder() / kind / f"{name}.yaml")
