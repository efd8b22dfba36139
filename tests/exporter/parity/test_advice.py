"""What a refusal of `parity` advises is tried: followed, the work begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.advice import invoke, refusal, with_option, without_option


class Begun(Exception):
    """The work that was asked for has begun."""


@pytest.fixture(autouse=True)
def _stop_where_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object, **__: object) -> None:
        raise Begun

    parity = "seekforge.exporter.parity"
    for name in ("sources.check_engine", "sources.Walker.run", "sources.Walker.judge_dump", "sides.transformers._load"):
        monkeypatch.setattr(f"{parity}.{name}", begin)


@pytest.fixture(scope="module")
def dumped(tiny_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the exact engine."""
    out = tmp_path_factory.mktemp("dump") / "engine"
    result = invoke("dump", tiny_engines["exact"], out, "--contexts", "5", "--modes", "whole", "--quiet")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def places(tiny_engines: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, dumped: Path) -> dict[str, str]:
    (tmp_path / "prompts.txt").write_text("Hello\n", encoding="utf-8")
    return {
        "engine": str(tiny_engines["exact"]), "checkpoint": str(tiny_checkpoint), "dump": str(dumped),
        "prompts": str(tmp_path / "prompts.txt"), "save": str(tmp_path / "saved"),
    }  # fmt: skip


Follow = Callable[[list[str], str, dict[str, str]], list[str]]


def leave_out(name: str, *, has_value: bool = True) -> Follow:
    return lambda args, line, places: without_option(args, name, has_value=has_value)


def put(name: str, value: str) -> Follow:
    """Give an option the value, or what the pattern finds in the line."""

    def follow(args: list[str], line: str, places: dict[str, str]) -> list[str]:
        if value in places:
            return [*args, name, places[value]]
        match = re.search(value, line)
        assert match is not None, line
        return with_option(args, name, match[1] if match.groups() else match[0])

    return follow


PARITY = ["parity", "{engine}", "--checkpoint", "{checkpoint}", "--threads", "1"]
FEW = ["--contexts", "5", "--modes", "whole"]

CASES: dict[str, tuple[list[str], str, Follow]] = {
    "no weights": (["parity", "{engine}", *FEW], "needs --checkpoint", put("--checkpoint", "checkpoint")),
    "nothing to compare": (
        ["parity", "--checkpoint", "{checkpoint}", *FEW],
        "--save writes PyTorch's side",
        put("--save", "save"),
    ),
    "a dump alone": (["parity", "--from-dump", "{dump}"], "needs --checkpoint", put("--checkpoint", "checkpoint")),
    "a dump and an engine": (
        [*PARITY, "--from-dump", "{dump}"],
        "takes one or two dumps and no ENGINE",
        lambda args, line, places: [arg for arg in args if arg != places["engine"]][:3] + args[-2:],
    ),
    "prompts and contexts": (
        [*PARITY, "--prompts", "{prompts}", "--contexts", "5"],
        "drop --contexts",
        leave_out("--contexts"),
    ),
    "a context that is too long": (
        [*PARITY, "--contexts", "100000000", "--modes", "whole"],
        "accepts",
        put("--contexts", r"accepts (\d+)"),
    ),
    "transformers in parts": (
        [*PARITY, "--contexts", "5", "--modes", "whole,decode", "--against", "transformers"],
        "pass --modes whole",
        put("--modes", r"pass --modes (whole)"),
    ),
    "what rounding costs where there is none": (
        [*PARITY, *FEW, "--sensitivity"],
        "no layer costs anything",
        leave_out("--sensitivity", has_value=False),
    ),
    "a self-check of some layers": (
        [*PARITY, *FEW, "--layers", "1-2", "--write-self-check"],
        "leave out --layers",
        leave_out("--layers"),
    ),
    "a self-check without a whole prompt": (
        [*PARITY, "--contexts", "70", "--modes", "ragged", "--write-self-check"],
        "leave 'whole' in --modes",
        put("--modes", "whole"),
    ),
    "a rounding that is none": (
        [*PARITY, *FEW, "--without", "kv_fp9"],
        "expected some of",
        put("--without", r"expected some of (\w+)"),
    ),
    "layers against another side": (
        [*PARITY, *FEW, "--layers", "1-2", "--against", "transformers"],
        "needs --against torch",
        put("--against", r"--against (torch)"),
    ),
    "tables and JSON": (
        [*PARITY, *FEW, "--brief", "--json"],
        "--json prints everything",
        leave_out("--brief", has_value=False),
    ),
    "nothing to replace": ([*PARITY, *FEW, "--force"], "give that too", put("--save", "save")),
}


@pytest.mark.parametrize("name", CASES)
def test_advice_leads_on(name: str, places: dict[str, str]) -> None:
    command, message, follow = CASES[name]
    args = [arg.format(**places) for arg in command]
    line = refusal(*args)
    assert message in line
    with pytest.raises(Begun):
        invoke(*follow(args, line, places))
