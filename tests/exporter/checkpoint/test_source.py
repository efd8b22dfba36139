"""A checkpoint is a local folder or a hub repository; what cannot be had is one line."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from seekforge.common.errors import CheckpointError, EnvironmentFault
from seekforge.exporter.checkpoint.source import resolve


def _hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return download(repo, **options)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_a_folder_is_itself_even_if_it_looks_like_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    calls = _hub(monkeypatch, lambda repo, **options: "/nowhere")
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(str(tmp_path)) == tmp_path
    # not a repository's name: the reader says what is wrong with the path
    assert resolve("/absent/folder/of/mine") == Path("/absent/folder/of/mine")
    assert resolve("absent") == Path("absent")
    assert calls == []


def test_a_cached_snapshot_is_used_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _hub(monkeypatch, lambda repo, **options: str(tmp_path))
    assert resolve("deepseek-ai/DeepSeek-V3.2", revision="abc") == tmp_path
    assert len(calls) == 1 and calls[0]["local_files_only"] and calls[0]["revision"] == "abc"
    assert "*.safetensors" in calls[0]["allow_patterns"]


def test_what_is_not_cached_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path)

    calls = _hub(monkeypatch, download)
    assert resolve("deepseek-ai/DeepSeek-V3.2-Speciale") == tmp_path
    assert len(calls) == 2


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: Any) -> str:
        raise ConnectionError("Cannot reach the hub: offline mode is enabled.\nTraceback and much more")

    _hub(monkeypatch, download)
    with pytest.raises(CheckpointError) as caught:
        resolve("deepseek-ai/DeepSeek-V3.2")
    message = str(caught.value)
    assert "\n" not in message and "offline mode is enabled" in message and "pass the folder" in message


def test_without_the_package_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFault, match="pip install 'huggingface_hub>"):
        resolve("deepseek-ai/DeepSeek-V3.2")


def test_the_real_package_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        resolve("nobody-at-all/no-such-model")
    assert "\n" not in str(caught.value)
