"""Compiled kernels are kept where there is a place, and nothing fails where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekforge.common.user_cache import user_cache
from seekforge.plugins.kernels import aot


def test_without_a_home_there_is_a_temporary_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "user_cache", lambda: None)
    with aot.cache_folder() as place:
        assert place.is_dir()
    assert not place.exists()


def test_a_home_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(aot, "user_cache", lambda: tmp_path / "file" / "below")
    with aot.cache_folder() as place:
        assert place.is_dir() and not place.is_relative_to(tmp_path)


def test_the_users_cache_and_the_folder_asked_for_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "user_cache", lambda: tmp_path / "cache")
    with aot.cache_folder() as place:
        assert place == tmp_path / "cache" / "kernels"
    assert place.is_dir()
    with aot.cache_folder(tmp_path / "asked") as place:
        assert place == tmp_path / "asked"


@pytest.mark.parametrize("home", ["", "folder", "./folder"])
def test_a_home_that_is_no_absolute_path_is_none(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    assert user_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert user_cache() == Path("/caches/seekforge")
