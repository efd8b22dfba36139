"""Where a checkpoint comes from: a local folder, or a repository of the Hugging Face hub.

The three sibling checkpoints (V3.2-Exp, V3.2, V3.2-Speciale) have one architecture and are the same to us.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from seekforge.plugins.errors import CheckpointError, EnvironmentFault
from seekforge.plugins.requirements import install_module

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What a checkpoint folder needs of a repository.
_PATTERNS = ["*.safetensors", "*.json", "encoding/*"]


def resolve(source: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading it if `source` names a hub repository.

    Args:
        source: a folder, or `owner/name` where no such folder exists. A snapshot in the hub's cache is used as it
            is, without asking the network.
        revision: of the repository: a branch, tag or commit; None takes its main branch.

    Raises:
        CheckpointError: there is no such folder or repository, or the network cannot be reached.
        EnvironmentFault: huggingface_hub is not installed.
    """
    folder = Path(source)
    if folder.exists() or not _REPO_ID.fullmatch(source):
        return folder
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise EnvironmentFault(
            f"{source}: no such folder; to read it as a Hugging Face repository {install_module('huggingface_hub')}, "
            "or pass the folder of a downloaded checkpoint"
        ) from None
    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=_PATTERNS, local_files_only=True))
    except Exception:  # not in the cache, or only in part: ask the network
        pass
    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # of a dozen classes, ours, of its HTTP client's and of the operating system
        raise CheckpointError(
            f"{source}: no such folder, and the Hugging Face hub does not give it ({_reason(error)}); pass the folder "
            "of a downloaded checkpoint, or try again online"
        ) from None


def _reason(error: Exception) -> str:
    """Return the first line of what an error says, or its class."""
    text = str(error).strip().partition("\n")[0].strip().rstrip(".:")
    return text or type(error).__name__
