"""Systems that lack calls of Linux: the CPU path goes on without them, and Windows is refused with one line."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from seekforge.common import system
from seekforge.common.errors import EnvironmentFault
from seekforge.common.system import cpu_seconds, peak_bytes, read_at
from seekforge.runtime.cli import main as cli
from seekforge.runtime.engine.engine_folder import Engine

ROOT = Path(__file__).resolve().parents[2]
#: Calls of `os` that Linux has and macOS, or an older one, has not.
LINUX_ONLY = {
    "preadv", "pwritev", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "splice",
    "copy_file_range", "memfd_create", "eventfd", "pidfd_open", "getrandom", "setresuid", "unshare",
}  # fmt: skip
#: Modules that Windows has not: imported at the top they would be a traceback before the refusal.
UNIX_MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}


@pytest.mark.parametrize("has_preadv", [True, False])
def test_bytes_are_read_at_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_preadv: bool) -> None:
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    out = bytearray(20)
    with path.open("rb") as file:
        assert read_at(file.fileno(), memoryview(out), 10) == 20 and out == bytes(range(10, 30))
        assert read_at(file.fileno(), memoryview(out), 95) == 5 and out[:6] == bytes([*range(95, 100), 15])
        assert read_at(file.fileno(), memoryview(out), 100) == 0
        assert file.tell() == 0


@pytest.mark.parametrize("has_preadv", [True, False])
def test_no_read_asks_for_more_than_macos_gives(monkeypatch: pytest.MonkeyPatch, has_preadv: bool) -> None:
    asked: list[int] = []
    monkeypatch.setattr(system, "_MOST_AT_ONCE", 10)
    if has_preadv:
        monkeypatch.setattr(os, "preadv", lambda file, out, offset: asked.append(len(out[0])) or 10, raising=False)
    else:
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.setattr(os, "pread", lambda file, size, offset: asked.append(size) or bytes(size))
    assert read_at(0, memoryview(bytearray(25)), 0) == 10 and asked == [10]


def test_memory_is_told_without_proc_and_is_zero_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_bytes() > 1 << 20
    monkeypatch.setattr(system, "Path", lambda name: Path("/nonexistent"))
    linux = peak_bytes()
    assert linux > 1 << 20
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes() == pytest.approx(linux / 1024, rel=0.1), "macOS counts bytes, Linux KiB"
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes() == 0
    assert cpu_seconds() > 0


@pytest.mark.parametrize("name", ["win32", "cygwin"])
def test_windows_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", name)
    for args in ([], ["doctor"], ["run", "x", "--prompt", "a"], ["--help"]):
        result = CliRunner().invoke(cli.main, args)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr == "error: seekforge runs on Linux and macOS, and this is Windows; use it inside WSL 2\n"
    with pytest.raises(EnvironmentFault, match="WSL 2"):
        Engine.open(tmp_path)


def sources(about: str = "") -> list[tuple[Path, ast.Module]]:
    """Return our modules that say `about`."""
    paths = [path for root in ("exporter", "plugins", "runtime") for path in sorted((ROOT / root).rglob("*.py"))]
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [(path, ast.parse(text)) for path, text in texts if about in text]


def test_calls_that_only_linux_has_are_asked_for_first() -> None:
    for path, tree in sources():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                asked = f'hasattr(os, "{node.attr}")' in text or node.attr not in LINUX_ONLY
                assert asked, f"{path}: os.{node.attr}"


def test_what_other_programs_say_is_read_even_where_it_is_no_text() -> None:
    """A path in a message of a compiler need not be UTF-8."""
    calls = 0
    for path, tree in sources("subprocess"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            names = {word.arg for word in node.keywords}
            if names & {"capture_output", "stdout", "stderr"} and names & {"text", "encoding", "universal_newlines"}:
                assert "errors" in names, f"{path}:{node.lineno}"
                calls += 1
    assert calls >= 9


def test_no_module_needs_one_that_only_unix_has_to_be_imported() -> None:
    for path, tree in sources():
        for node in tree.body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not UNIX_MODULES & {name.partition(".")[0] for name in names}, path


def test_an_engine_runs_where_the_system_has_no_more_than_macos(tiny_engines: dict[str, Path]) -> None:
    script = f"""
import os, sys
for name in {sorted(LINUX_ONLY)!r}:
    if hasattr(os, name):
        delattr(os, name)
sys.modules["resource"] = None
from pathlib import Path
real = Path.read_text
def read_text(self, *args, **options):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file", str(self))
    return real(self, *args, **options)
Path.read_text = read_text
from seekforge.runtime.cli.main import main
main()
"""
    args = ["run", str(tiny_engines["fp8"]), "--prompt", "Hello", "--max-tokens", "2", "--greedy", "--quiet"]
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


_CHILD = "from seekforge.common.system import end_with_parent; end_with_parent(); import time; print(1, flush=True); "
_PARENT = """
import subprocess, sys
from seekforge.common.system import child_environment
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=child_environment(), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_what_does_a_part_of_the_work_ends_with_a_killed_parent(platform: str) -> None:
    child = f"import sys; sys.platform = {platform!r}; " if platform != "linux" else ""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PARENT, f"{child}{_CHILD}time.sleep(120)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    for _ in range(300):
        if not _runs(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the child goes on")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_anyone_else_starts_goes_on() -> None:
    """A dump that a person starts, or one whose environment was handed on, has no parent to end with."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = (
        "import os; from seekforge.common.system import end_with_parent; end_with_parent(); "
        "os.environ['SEEKFORGE_PARENT_PID'] = str(os.getppid()); end_with_parent(); "
        "print('SEEKFORGE_PARENT_PID' in os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
