"""What is odd in a folder is one line before torch is imported, by every command that would need torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

INDEX = "model.safetensors.index.json"
#: What stands in place of a file -> how it is made.
ODD: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "ten terabytes": lambda path: (path.touch(), os.truncate(path, 10 << 40)),
}
#: Also where a file is read as text.
ODD_TEXT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.touch(),
    "nested": lambda path: path.write_text("[" * 200_000),
    "UTF-16": lambda path: path.write_bytes('{"a": 1}'.encode("utf-16")),
    "a key twice": lambda path: path.write_text('{"model_type": "a", "model_type": "b"}'),
    "NaN": lambda path: path.write_text('{"model_type": NaN}'),
    "many digits": lambda path: path.write_text('{"hidden_size": ' + "9" * 5000 + "}"),
    "half a pair": lambda path: path.write_text('{"\\ud800": 1}'),
    "ESC": lambda path: path.write_text('{"model_type": "\\u001b]0;x\\u0007[/red]"}'),
}
#: Runs commands in one process, and tells of each what it said.
SCRIPT = """
import json, sys
from click.testing import CliRunner
from seekforge.runtime.cli.main import main
for command in json.load(sys.stdin):
    done = CliRunner().invoke(main, command)
    print(json.dumps([done.exit_code, done.stderr, "torch" in sys.modules]))
"""


def _spoilt(source: Path, folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    shutil.copytree(source, folder, copy_function=os.link)
    path = folder / name
    path.unlink(missing_ok=True)
    make(path)
    return folder


def test_what_is_odd_is_said_at_once(
    tiny_checkpoint: Path, tiny_programs: dict[str, Path], tiny_engines: dict[str, Path], tmp_path: Path
) -> None:
    shard = next(path.name for path in sorted(tiny_checkpoint.glob("*.safetensors")))
    program, engine, out = str(tiny_programs["fp8"]), str(tiny_engines["fp8"]), str(tmp_path / "out")
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"text": "a"}\n')
    commands: list[list[str]] = [["train", out, "--preset", "full"]]
    cases = [("config.json", what, make) for what, make in {**ODD, **ODD_TEXT}.items()]
    cases += [(name, what, ODD[what]) for name in (INDEX, shard) for what in ("FIFO", "folder", "device", "loop")]
    folders = [
        _spoilt(tiny_checkpoint, tmp_path / f"checkpoint-{number}", name, make)
        for number, (name, _, make) in enumerate(cases)
    ]
    for name in ("FIFO", "device", "loop", "empty"):  # and in place of the folder itself
        folders.append(tmp_path / f"no-checkpoint-{name}")
        (ODD | ODD_TEXT)[name](folders[-1])
    for folder in map(str, [*folders, tmp_path / "missing", tiny_checkpoint / "config.json"]):
        commands += [
            ["parity", "--checkpoint", folder, "--save", out],
            ["parity", engine, "--checkpoint", folder],
            ["build", program, out, "--target", "cpu", "--checkpoint", folder, "--quiet"],
            ["export", folder, out, "--quiet"],
            ["train", out, "--checkpoint", folder, "--data", str(examples), "--quiet"],
        ]
    for number, make in enumerate({**ODD, **ODD_TEXT}.values()):
        make(tmp_path / f"examples-{number}")
        given = ["--data", str(tmp_path / f"examples-{number}"), "--quiet"]
        commands.append(["train", out, "--checkpoint", str(tiny_checkpoint), *given])
    for number, (what, make) in enumerate({**ODD, **ODD_TEXT}.items()):
        spoilt = str(_spoilt(tiny_engines["fp8"], tmp_path / f"engine-{number}", "manifest.json", make))
        commands.append(["parity", spoilt, "--checkpoint", str(tiny_checkpoint)])
        spoilt = str(_spoilt(tiny_programs["fp8"], tmp_path / f"program-{number}", "program.json", make))
        commands.append(["build", spoilt, out, "--target", "cpu", "--checkpoint", str(tiny_checkpoint), "--quiet"])
        if what != "empty":
            (tmp_path / f"dump-{number}").mkdir()
            make(tmp_path / f"dump-{number}" / "dump.json")
            commands.append(["parity", "--from-dump", str(tmp_path / f"dump-{number}"), "--from-dump", engine])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(commands), capture_output=True, text=True, check=True
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(commands)
    for command, (code, error, with_torch) in zip(commands, said, strict=True):
        assert code == 2 and not with_torch, (command, code, error, with_torch)
        assert error.startswith("error: ") and error.count("\n") == 1 and "\x1b" not in error, (command, error)
    assert not Path(out).exists()
