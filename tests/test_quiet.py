"""Commands open no network socket and write nowhere but in their folders: watched from outside, with a fresh home."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.lm_eval_tasks import write_tasks

ROOT = Path(__file__).resolve().parents[1]
_WATCHED = (
    "trace=socket,connect,bind,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,symlink,symlinkat,link,linkat"
)
_SOCKET = re.compile(r"\bsocket\((AF_\w+)")
#: Asks this machine's name service who the user is, as the C library's `getpwuid` does; it is no network.
_NAME_SERVICE = re.compile(r"\bconnect\(\d+[^,]*, \{sa_family=AF_UNIX, sun_path=\"/(?:var/)?run/nscd/socket\"\}")
_WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|\b(?:creat|mkdir|rename|symlink|link)(?:at2?)?\(")
#: A place that a call names: a path, or the folder that a descriptor stands for with a path in it.
_PLACE = re.compile(r'(?:(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>, )?"(?P<path>[^"]*)"')


@functools.cache
def strace() -> str:
    """Return why commands cannot be watched here, or nothing."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"strace cannot trace here ({done.stderr.strip().splitlines()[-1:]})"


class Watch:
    """Runs commands with a home, a folder for temporary files and a working folder of their own."""

    def __init__(self, root: Path) -> None:
        self.home, self.temporary, self.work = root / "home", root / "tmp", root / "work"
        for folder in (self.home, self.temporary, self.work):
            folder.mkdir()
        self._log = root / "calls"
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
        self._environment = kept | {
            "HOME": str(self.home), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip

    def run(self, *args: object, typed: str = "") -> tuple[list[str], list[str]]:
        """Run a command, which must succeed.

        Args:
            args: the words after `seekforge`.
            typed: what it gets on its standard input.

        Returns:
            Families of the sockets that it made, and paths that it wrote outside of its folders.
        """
        done = subprocess.run(
            self._command(*args), cwd=self.work, env=self._environment, input=typed, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return self.seen()

    @contextmanager
    def running(self, *args: object) -> Iterator[subprocess.Popen[str]]:
        """Run a command beside the test, which is over when the block is; `seen` says then what it did."""
        with subprocess.Popen(
            self._command(*args), cwd=self.work, env=self._environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def _command(self, *args: object) -> list[str]:
        return [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-y",
            "-qq",
            "-e",
            _WATCHED,
            "-e",
            "signal=none",
            "-s",
            "4096",
            "-o",
            str(self._log),
            sys.executable,
            "-m",
            "seekforge",
            *map(str, args),
        ]

    def calls(self) -> list[str]:
        """Return the calls of the last command."""
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()

    def seen(self) -> tuple[list[str], list[str]]:
        """Return what `run` does, of the last command."""
        lines = self.calls()
        families = [match[1] for match in map(_SOCKET.search, lines) if match is not None]
        for _ in filter(_NAME_SERVICE.search, lines):
            families.remove("AF_UNIX")
        return families, sorted(self._foreign(line for line in lines if _WRITES.search(line) and " = -1 " not in line))

    def _foreign(self, lines: Iterable[str]) -> set[str]:
        ours = (self.work, self.temporary, self.home / ".cache" / "seekforge", Path("/dev"), Path("/proc"))
        written = set()
        for line in lines:
            for match in _PLACE.finditer(line):
                path = Path(os.path.normpath(self.work / (match["folder"] or "") / match["path"]))
                parents = [self.home / ".cache"]  # what the cache lies in may have to be made
                if not any(path.is_relative_to(folder) for folder in ours) and path not in parents:
                    written.add(str(path))
        return written

    def left(self) -> list[str]:
        """Return the files below the home, the cache left out, and what is left of temporary files."""
        cache = self.home / ".cache" / "seekforge"
        found = [path for path in self.home.rglob("*") if path.is_file() and not path.is_relative_to(cache)]
        return [str(path) for path in [*found, *self.temporary.iterdir()]]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    if strace():
        pytest.skip(strace())
    return Watch(tmp_path)


def test_the_watch_sees_what_it_should(watch: Watch) -> None:
    script = (
        "import os, pathlib, socket; socket.socket(socket.AF_INET).close(); home = pathlib.Path.home();"
        "(home / 'x').write_text('a'); os.mkdir('here'); fd = os.open(home, os.O_RDONLY);"
        "os.close(os.open('deep', os.O_CREAT | os.O_WRONLY, dir_fd=fd))"
    )
    module = watch.work / "seekforge"
    module.mkdir()
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(script, encoding="utf-8")
    watch._environment["PYTHONPATH"] = str(watch.work)
    families, written = watch.run()
    assert families == ["AF_INET"] and written == [str(watch.home / "deep"), str(watch.home / "x")]
    assert watch.left() == [str(watch.home / "deep"), str(watch.home / "x")] or len(watch.left()) == 2


def test_running_an_engine_opens_no_socket_and_leaves_nothing(watch: Watch, tiny_engines: dict[str, Path]) -> None:
    found = watch.run("run", tiny_engines["fp8"], "--prompt", "Hello", "--max-tokens", 2, "--greedy", "--quiet")
    assert (found, watch.left()) == (([], []), [])


def test_drawing_a_chart_leaves_the_chart_alone(watch: Watch, tiny_checkpoint: Path) -> None:
    assert watch.run("plan", tiny_checkpoint, "--chart", "chart.svg") == ([], [])
    assert watch.left() == [] and (watch.work / "chart.svg").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_command_opens_a_socket_or_leaves_anything(watch: Watch, tiny_checkpoint: Path) -> None:
    for args in (
        ("doctor",),
        ("targets",),
        ("new-checkpoint", "checkpoint"),
        ("inspect", tiny_checkpoint),
        ("export", tiny_checkpoint, "program"),
        ("export", tiny_checkpoint, "exact", "--numerics", "exact"),
        ("inspect", "program"),
        ("build", "program", "engine", "--target", "cpu", "--checkpoint", tiny_checkpoint),
        ("build", "exact", "engine-exact", "--target", "cpu", "--checkpoint", tiny_checkpoint),
        ("inspect", "engine"),
        ("bench", "engine", "--contexts", "8", "--concurrency", "1", "--max-tokens", "2", "--chart", "bench.png"),
        ("parity", "engine-exact", "--checkpoint", tiny_checkpoint, "--contexts", "10", "--brief"),
        ("parity", "engine-exact", "--checkpoint", tiny_checkpoint, "--contexts", "10", "--brief", "--modes", "whole",
         "--against", "transformers"),
        ("kernels", "build", "kernels", "--sm", "89", "--op", "DsaCacheWrite"),
        ("build", "program", "rtx", "--target", "rtx4090", "--checkpoint", tiny_checkpoint),
        ("dump", "engine", "dumped", "--contexts", "5", "--modes", "whole,decode"),
        ("plan", tiny_checkpoint),
        ("completion", "bash"),
    ):  # fmt: skip
        assert (args, watch.run(*args), watch.left()) == (args, ([], []), [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_opens_no_socket_and_leaves_its_checkpoint_alone(watch: Watch) -> None:
    examples = watch.work / "examples.jsonl"
    examples.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n' * 4, encoding="utf-8")
    for args in (
        ("new-checkpoint", "nano", "--preset", "nano"),
        ("train", "tuned", "--checkpoint", "nano", "--data", examples, "--steps", 1, "--threads", 1),
    ):
        assert (args, watch.run(*args), watch.left()) == (args, ([], []), [])
    assert sorted(path.name for path in watch.work.iterdir()) == ["examples.jsonl", "nano", "tuned"]


def test_a_conversation_opens_no_socket_and_leaves_nothing(watch: Watch, tiny_engines: dict[str, Path]) -> None:
    typed = "Hello\n/new\nagain\n/quit\n"
    args = ("chat", tiny_engines["fp8"], "--max-tokens", 2, "--quiet", "--no-thinking")
    assert watch.run(*args, typed=typed) == ([], [])
    assert watch.left() == [] and not list(watch.work.iterdir())


def test_a_server_listens_where_it_was_asked_and_calls_nobody(watch: Watch, tiny_engines: dict[str, Path]) -> None:
    with watch.running("serve", tiny_engines["fp8"], "--port", 0, "--threads", 1, "--json", "--quiet") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        body = json.dumps({"prompt": "Hello", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read())["choices"]
        traced = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(traced, signal.SIGTERM)
        process.wait(60)
    families, written = watch.seen()
    network = [line for line in watch.calls() if re.search(r"\b(?:bind|connect)\(.*sa_family=AF_INET", line)]
    assert written == [] and watch.left() == []
    assert set(families) <= {"AF_INET", "AF_UNIX"} and families.count("AF_INET") == 1
    assert len(network) == 1 and "bind(" in network[0] and 'inet_addr("127.0.0.1")' in network[0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_scoring_local_tasks_opens_no_socket_and_leaves_nothing(watch: Watch, tiny_engines: dict[str, Path]) -> None:
    tasks = watch.work / "tasks"
    write_tasks(tasks, 2)
    args = ("eval", tiny_engines["fp8"], "--tasks", "words_choice", "--include-path", tasks, "--output", "scores")
    assert watch.run(*args) == ([], [])
    assert watch.left() == []


def test_the_library_is_told_before_anything_can_import_it() -> None:
    for module in (
        "seekforge.exporter.builder.onnxruntime.session",
        "seekforge.plugins.testing",
        "seekforge.runtime.backends",
    ):
        script = f"import {module}, os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
        environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_who_asks_for_telemetry_keeps_it() -> None:
    script = "import seekforge.runtime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n"
