"""`make demo`: from nothing to streamed text, and then the proof, by the commands that a user would type, each shown.

Text comes as soon as there is an engine. What only the proof needs (a second program, the side of transformers) is made
on the second core meanwhile; its output is shown where its turn comes. Every command gets one thread for each library:
the matrices are tiny, and threads that wait for each other made the demo seven times as slow on a busy machine.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

#: By the interpreter that runs this, so that nothing has to be on the PATH.
SEEKFORGE = [sys.executable, "-m", "seekforge"]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Running(NamedTuple):
    """A command that runs behind what is shown, and what it has printed."""

    words: list[str]
    process: subprocess.Popen[bytes]
    output: IO[bytes]


class Demo:
    """Runs commands one after the other, or behind the others; ends all of them if one fails."""

    def __init__(self) -> None:
        self._behind: list[Running] = []

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._behind:
            running.process.terminate()  # which seekforge takes as a request to clean up
            running.process.wait()
            running.output.close()

    def show(self, *arguments: str | Path) -> None:
        """Show a seekforge command and run it; end with its exit code if it fails."""
        words = _words(arguments)
        _show(words)
        _expect(subprocess.run(words, env=os.environ | ONE_THREAD, check=False).returncode)

    def begin(self, *arguments: str | Path) -> Running:
        """Start a command whose output is kept for `finish`."""
        words = _words(arguments)
        with ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                words, env=os.environ | ONE_THREAD, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            stack.pop_all()
        running = Running(words, process, output)
        self._behind.append(running)
        return running

    @contextmanager
    def serve(self, engine: Path) -> Iterator[str]:
        """Show the command that serves an engine and run it for as long as the context lasts; gives its address."""
        words = _words(("serve", engine, "--port", "0", "--max-model-len", "2K"))
        _show(words)
        with subprocess.Popen(words, env=os.environ | ONE_THREAD, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            lines: list[str] = []
            for line in server.stderr:
                lines.append(line)
                if line.startswith("serving"):
                    break
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
            if not lines or not lines[-1].startswith("serving"):
                _expect(server.wait() or 1)
            drain = threading.Thread(target=server.stderr.read, daemon=True)  # the log, which else fills the pipe
            drain.start()
            try:
                yield lines[-1].split()[1]
            finally:
                server.terminate()
                drain.join()

    def example(self, name: str, *arguments: str) -> None:
        """Show a script of `examples/` and run it."""
        path = Path("examples") / name
        print(f"$ python {shlex.join([str(path), *arguments])}", flush=True)
        script = Path(__file__).resolve().parents[1] / path
        _expect(subprocess.run([sys.executable, str(script), *arguments], check=False).returncode)

    def finish(self, running: Running) -> None:
        """Wait for a command, and show it with what it printed as if it had been run now."""
        _show(running.words)
        code = running.process.wait()
        running.output.seek(0)
        sys.stdout.buffer.write(running.output.read())
        sys.stdout.flush()
        _expect(code)


def main() -> None:
    """Run every step in the folder given on the command line."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    checkpoint, program, engine = out / "checkpoint", out / "program", out / "engine"
    exact, exact_engine = out / "program-exact", out / "engine-exact"
    started = time.monotonic()
    with Demo() as demo:
        say("1. A checkpoint: file for file like a DeepSeek-V3.2 download, but small, and trained.")
        demo.show("new-checkpoint", checkpoint, "--preset", "nano", "--force")
        second = demo.begin("export", checkpoint, exact, "--numerics", "exact", "--force")
        say("2. Export: one ONNX program with custom operators. No weight is read.")
        demo.show("export", checkpoint, program, "--force")
        say("3. Build: an engine for a target, here ONNX Runtime on this CPU.")
        demo.show("build", program, engine, "--target", "cpu", "--checkpoint", checkpoint, "--force")
        say("4. Run: text streams as it is made; a sum is thought out, then answered.")
        demo.show("run", engine, "--prompt", "Once upon a time", "--max-tokens", "64", "--seed", "1", "--quiet")
        demo.show("run", engine, "--chat", "--thinking", "--prompt", "What is 345 + 78?", "--greedy")
        say("5. Parity: the same with exact numerics (FP32, no FP8 rounding), where every difference counts.")
        demo.finish(second)
        demo.show("build", exact, exact_engine, "--target", "cpu", "--checkpoint", checkpoint, "--force")
        check = ("parity", exact_engine, "--checkpoint", checkpoint, "--contexts", "10,65,200", "--brief")
        other = demo.begin(*check, "--modes", "whole", "--against", "transformers")
        demo.show(*check, "--modes", "whole,decode")
        demo.finish(other)
        say("6. Serve: the engine behind OpenAI's interface; its client asks, a tool is called, the model answers.")
        with demo.serve(engine) as url:
            demo.example("tool_call.py", url)
    say(f"Done in {time.monotonic() - started:.0f} s. It is all in {out}/; try: seekforge --help")


def say(text: str) -> None:
    """Print a line that explains the next command."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def _words(arguments: tuple[str | Path, ...]) -> list[str]:
    return [*SEEKFORGE, *map(str, arguments)]


def _show(words: list[str]) -> None:
    print(f"$ seekforge {shlex.join(words[len(SEEKFORGE) :])}", flush=True)


def _expect(code: int) -> None:
    if code:
        sys.exit(code if code > 0 else 128 - code)  # a signal, as a shell tells it


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
