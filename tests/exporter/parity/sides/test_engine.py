"""How the runtime is started for the engine's side of a check, and what is told when it cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from seekforge.common.errors import EngineError
from seekforge.exporter.parity.sides.engine import EngineSide
from seekforge.formats.parity_steps import make_plan
from seekforge.runtime.cli.dump import dump

#: Stands in for Python: keeps its arguments, says what no text is, and fails.
RUNTIME = """#!{python}
import json, sys
json.dump(sys.argv[1:], open("arguments", "w"))
sys.stderr.buffer.write(b"error: no such file: caf\\xe9\\n")
sys.exit(2)
"""


@pytest.mark.parametrize("name", ["-e", "--force", "an engine"])
def test_any_folder_is_one_for_the_runtime_too(
    name: str, tiny_engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`parity ./-e` has a path that begins with a dash, which the process that runs the engine took for an option."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(tiny_engines["exact"])
    runtime = tmp_path / "runtime"
    runtime.write_text(RUNTIME.format(python=sys.executable))
    runtime.chmod(0o755)
    side = EngineSide(Path(".", name), tmp_path, threads=1)
    plan = make_plan(contexts=(5,), vocab_size=1024, index_topk=64, has_mtp=True, modes=("decode",))
    monkeypatch.setattr(sys, "executable", str(runtime))
    with pytest.raises(EngineError, match="no such file: caf\N{REPLACEMENT CHARACTER}"):
        side.dump(plan, Path(name, "out"), ())
    words = json.loads((tmp_path / "arguments").read_text())
    assert words[:2] == ["-m", "seekforge.runtime.cli.dump"]
    asked = dump.make_context("dump", words[2:]).params
    assert (asked["engine"], asked["out"], asked["plan_file"]) == (
        Path(name),
        Path(name, "out"),
        tmp_path / "plan.json",
    )
