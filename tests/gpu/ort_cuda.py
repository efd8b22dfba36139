"""Engines of target ort-cuda on a GPU: built, run, and compared with PyTorch layer by layer. Part of `make gpu-check`.

python -m tests.gpu.ort_cuda FOLDER [--target ort-cuda]

Needs an environment of its own, with the extras export and ort-cuda: onnxruntime-gpu must not lie beside onnxruntime.
With `--target cpu` the same commands run on a CPU.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

#: Models of which an engine is made; the second has attention without an indexer.
PRESETS = ("tiny", "tiny-v3")


def commands(folder: Path, preset: str, target: str) -> list[list[str]]:
    """Return the commands that prove one engine, in order."""
    checkpoint, program, engine = (str(folder / f"{preset}-{name}") for name in ("checkpoint", "program", "engine"))
    return [
        ["new-checkpoint", checkpoint, "--preset", preset, "--random", "--force", "--quiet"],
        ["export", checkpoint, program, "--numerics", "exact", "--force", "--quiet"],
        ["build", program, engine, "--target", target, "--checkpoint", checkpoint, "--max-model-len", "1K", "--force"],
        # the self-check is repeated when it starts; a fallback to the CPU is an error
        ["run", engine, "--prompt", "Hello", "--max-tokens", "16", "--greedy"],
        ["parity", engine, "--checkpoint", checkpoint],
        ["bench", engine],
    ]


def main() -> int:
    """Run all commands; returns the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="ort-cuda")
    parser.add_argument("--preset", action="append", choices=PRESETS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for preset in options.preset or PRESETS:
        for words in commands(options.folder, preset, options.target):
            print(f"$ seekforge {shlex.join(words)}", flush=True)
            done = subprocess.run([sys.executable, "-m", "seekforge", *words], check=False)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
