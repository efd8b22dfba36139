"""`make demo`: from nothing to streamed text, by the commands that a user would type, each shown before it runs."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

#: Of the interpreter that runs this, so that nothing has to be on the PATH.
BIN = Path(sys.executable).parent


def main() -> None:
    """Run every step in the folder given on the command line."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    checkpoint = out / "checkpoint"
    started = time.monotonic()
    say("1. A checkpoint: file for file like a DeepSeek-V3.2 download, but tiny and with random weights.")
    seekforge("new-checkpoint", checkpoint, "--preset", "tiny", "--force")
    say("2. Export: one ONNX program with custom operators. No weight is read.")
    seekforge("export", checkpoint, out / "program", "--force")
    say("3. Build: an engine for a target, here ONNX Runtime on this CPU.")
    seekforge("build", out / "program", out / "engine", "--target", "cpu", "--checkpoint", checkpoint, "--force")
    say("4. Parity: the same with exact numerics (FP32, no FP8 rounding), where every difference counts.")
    exact, exact_engine = out / "program-exact", out / "engine-exact"
    seekforge("export", checkpoint, exact, "--numerics", "exact", "--force")
    seekforge("build", exact, exact_engine, "--target", "cpu", "--checkpoint", checkpoint, "--force")
    check = ("parity", exact_engine, "--checkpoint", checkpoint, "--contexts", "10,65,200", "--brief")
    seekforge(*check, "--modes", "whole,decode")
    seekforge(*check, "--modes", "whole", "--against", "transformers")
    say("5. Run: text streams as it is made. The weights are random, and so is the text.")
    seekforge("run", out / "engine", "--prompt", "Hello", "--max-tokens", "64", "--greedy")
    say(f"Done in {time.monotonic() - started:.0f} s. It is all in {out}/; try: seekforge --help")


def say(text: str) -> None:
    """Print a line that explains the next command."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def seekforge(*arguments: str | Path) -> None:
    """Show a seekforge command and run it; end with its exit code if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ seekforge {shlex.join(words)}", flush=True)
    done = subprocess.run([str(BIN / "seekforge"), *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
