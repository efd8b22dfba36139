"""`seekforge kernels build`: where it writes, and what is left of one that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.runtime.cli.main import main

ARGUMENTS = ("--model", "tiny", "--sm", "90", "--op", "MoeRoute", "--jobs", "1", "--quiet")


def test_a_folder_of_something_else_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    result = CliRunner().invoke(main, ["kernels", "build", str(tmp_path), *ARGUMENTS])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "manifest.json, which is no part of a store of kernels" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def children(process: int) -> set[int]:
    """Return the processes that one has started."""
    return {int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()}


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_build_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    places = {"TMPDIR": tmp_path / "tmp", "HOME": tmp_path / "home", "XDG_CACHE_HOME": tmp_path / "home" / "cache"}
    for place in places.values():
        place.mkdir(parents=True)
    store = tmp_path / "store"
    command = [sys.executable, "-m", "seekforge", "kernels", "build", str(store), *ARGUMENTS]
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    build = subprocess.Popen(command, env=environment)
    while not (scratch := list(places["TMPDIR"].glob("seekforge-kernels.*"))):
        assert build.poll() is None
        time.sleep(0.02)
    workers = children(build.pid)
    build.kill()
    build.wait()
    assert scratch and workers
    until = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < until, "a worker goes on compiling for nobody"
        time.sleep(0.05)
    subprocess.run(command, env=environment, check=True)
    assert (store / "index.json").is_file()
    assert not list(tmp_path.rglob("*.partial"))
