"""`make demo-ranks`: an engine of one rank and one of several print the same text, by commands that users type."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.demo import ONE_THREAD, SEEKFORGE, Demo, say

#: What both engines answer.
ASK = ("--prompt", "Hello", "--max-tokens", "32", "--greedy", "--quiet")
LAYOUT = ("--tp", "2")


def main() -> None:
    """Run every step in the folder given on the command line."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-ranks")
    checkpoint = out / "checkpoint"
    with Demo() as demo:
        say("1. A checkpoint, and two programs of it: of one rank, and of two that share heads, columns and experts.")
        demo.show("new-checkpoint", checkpoint, "--preset", "tiny", "--force", "--quiet")
        behind = demo.begin("export", checkpoint, out / "program-ranks", *LAYOUT, "--force", "--quiet")
        demo.show("export", checkpoint, out / "program", "--force", "--quiet")
        demo.finish(behind)
        say("2. Engines: each is compared with PyTorch before it is written.")
        for name in ("", "-ranks"):
            words = (out / f"program{name}", out / f"engine{name}", "--target", "cpu", "--checkpoint", checkpoint)
            demo.show("build", *words, "--force", "--quiet")
    say("3. One process answers, and then two.")
    texts = [_answer(out / f"engine{name}") for name in ("", "-ranks")]
    if texts[0] != texts[1]:
        sys.exit("error: the two engines print different text; please report this")
    say("The text is the same. docs/multi-gpu.md says how it comes about.")


def _answer(engine: Path) -> bytes:
    """Show the command that lets an engine answer, run it, and return the text."""
    words = [*SEEKFORGE, "run", str(engine), *ASK]
    print(f"$ seekforge {shlex.join(words[len(SEEKFORGE) :])}", flush=True)
    done = subprocess.run(words, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, check=False)
    sys.stdout.buffer.write(done.stdout)
    sys.stdout.flush()
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
