"""What the harness raises is one line that names its cause."""

from __future__ import annotations

import errno
import os

import pytest

from seekforge.common.errors import OutputError, RequestError
from seekforge.runtime.evaluation.harness import _blamed


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
    assert os.strerror(code) in str(found.value) and "HF_HOME" in str(found.value)


@pytest.mark.parametrize("cause", [ValueError("no"), OSError(errno.ENOENT, "No such file")], ids=repr)
def test_everything_else_is_a_matter_of_the_task(cause: Exception) -> None:
    with pytest.raises(RequestError, match=r"lm_eval says RuntimeError: An error occurred .* see the task's file"):
        _blamed("tasks x", lambda: generate(cause))
