"""What the harness raises is one line that names its cause."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seekforge.common.errors import OutputError, RequestError
from seekforge.runtime.evaluation.harness import _blamed, _copy_into


def generate(cause: Exception) -> None:
    """Fail as datasets does: with the reason as the cause of what is raised."""
    try:
        raise cause
    except Exception as error:
        raise RuntimeError("An error occurred while generating the dataset") from error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_is_full_is_not_blamed_on_the_task(code: int) -> None:
    with pytest.raises(OutputError, match="tasks x: lm_eval cannot write its copy of the data") as found:
        _blamed("tasks x", lambda: generate(OSError(code, os.strerror(code))))
    assert os.strerror(code) in str(found.value) and "TMPDIR" in str(found.value)


@pytest.mark.parametrize("cause", [ValueError("no"), OSError(errno.ENOENT, "No such file")], ids=repr)
def test_everything_else_is_a_matter_of_the_task(cause: Exception) -> None:
    with pytest.raises(RequestError, match=r"lm_eval says RuntimeError: An error occurred .* see the task's file"):
        _blamed("tasks x", lambda: generate(cause))


def test_data_that_lie_here_are_copied_where_it_is_told_and_nothing_below_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    library = SimpleNamespace(load_dataset=lambda path, *args, **options: asked.append({"path": path, **options}))
    monkeypatch.setitem(sys.modules, "datasets", library)
    _copy_into(tmp_path)
    for path in ("json", str(tmp_path)):
        library.load_dataset(path=path, name=None, cache_dir=None)
        assert asked.pop() == {"path": path, "name": None, "cache_dir": str(tmp_path)}
    library.load_dataset("owner/name", split="test")  # of the hub: found where an earlier run put it
    assert asked == [{"path": "owner/name", "split": "test"}]
