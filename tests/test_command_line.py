"""What holds for every command: found by walking all of them, so that a new one is held to it too."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from seekforge.common.cli.options import Command, Group, Listed, Number, Whole
from seekforge.runtime.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]


def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for below, one in command.commands.items():
            yield from walk(f"{name} {below}", one)


def every_command() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, entry in cli.COMMANDS.items():
        module, _, attribute = entry.target.partition(":")
        found |= dict(walk(name, getattr(importlib.import_module(module), attribute)))
    return found


COMMANDS = every_command()
LEAVES = {name: command for name, command in COMMANDS.items() if not isinstance(command, click.Group)}
OPTIONS = [
    pytest.param(name, option, id=f"{name} {option.opts[0]}")
    for name, command in LEAVES.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def invoke(*args: str, **env: str) -> Result:
    return CliRunner(env=env).invoke(cli.main, list(args))


def refused(*args: str) -> str:
    result = invoke(*args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def arguments(name: str) -> list[str]:
    """Something for every argument of a command."""
    values = {"shell": "bash", "model": "full"}
    wanted = [one for one in LEAVES[name].params if isinstance(one, click.Argument) and one.required]
    return [*name.split(), *(values.get(one.name or "", "/nowhere/at/all") for one in wanted)]


def test_every_command_is_ours_and_stands_in_a_section() -> None:
    for name, command in COMMANDS.items():
        assert isinstance(command, Command | Group), name
    text = invoke("--help").stdout
    for name, entry in cli.COMMANDS.items():
        section = text[text.index(f"{entry.section}:") :].partition("\n\n")[0]
        assert f"  {name} " in section


@pytest.mark.parametrize("name", LEAVES)
def test_every_help_has_examples_that_the_command_understands(name: str) -> None:
    command = LEAVES[name]
    assert isinstance(command, Command) and command.examples
    text = invoke(*name.split(), "--help").stdout
    for line in command.examples:
        assert f"  {line}\n" in text
        words = line.partition("  #")[0].partition(" | ")[0].removeprefix('eval "$(').removesuffix(')"')
        typed = shlex.split(words.partition(" > ")[0])
        assert typed[: 1 + len(name.split())] == ["seekforge", *name.split()], line
        rest = typed[1 + len(name.split()) :]
        command.make_context(name, rest, parent=click.Context(cli.main, info_name="seekforge"))


def documented() -> list[Any]:
    """Return every `seekforge` line of the pages, and of the files that run it: (place, words behind the command)."""
    found = []
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*")]
    for page in sorted([*pages, ROOT / "Makefile", ROOT / "Containerfile"]):
        if not page.is_file():
            continue
        text, variables = page.read_text(encoding="utf-8").replace("\\\n", " "), {}
        for line in text.splitlines():
            if assigned := re.match(r'\$ (\w+)="([^"]*)"$', line):
                variables[f"${assigned[1]}"] = assigned[2]
            match = re.match(r"(?:\$ |\s*(?:.venv/bin/)?(?:python -m )?)seekforge ([a-z-]+(?: .*)?)$", line)
            if match is None or (page.suffix == ".md" and not line.startswith("$ ")):
                continue
            said = match[1].partition("  #")[0].removesuffix(" &")
            for name, value in variables.items():
                said = said.replace(name, value)
            found.append(pytest.param(shlex.split(said), id=f"{page.name}: {said[:50]}"))
    return found


@pytest.mark.parametrize("words", documented())
def test_every_command_of_the_pages_is_understood(words: list[str]) -> None:
    name = next(name for name in sorted(LEAVES, key=len, reverse=True) if name.split() == words[: len(name.split())])
    parent = click.Context(cli.main, info_name="seekforge")
    LEAVES[name].make_context(name, words[len(name.split()) :], parent=parent)


def test_a_path_in_a_command_that_is_advised_is_quoted() -> None:
    """Commands with values in them are made by `typed_command`: a text with a path in it is torn at a space."""
    found, command = [], f"seekforge ({'|'.join(COMMANDS)}) "
    for root in ("exporter", "plugins", "runtime"):
        for path in sorted((ROOT / root).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if re.search(command, text) else ():
                if not isinstance(node, ast.JoinedStr):
                    continue
                words = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
                if re.search(rf"{command}[^'\";]*{{}}", "".join(words)):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_the_pages_have_commands() -> None:
    assert len(documented()) > 40


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_says_what_it_is(name: str) -> None:
    options = [option for option in LEAVES[name].params if isinstance(option, click.Option)]
    silent = {
        option.opts[0]: text
        for option in options
        for text in [option.help or ""]
        if not (text.rstrip("]").endswith((".", ":")) or "[default" in text or "  " in text)
    }
    assert silent == {}


@pytest.mark.parametrize("name", LEAVES)
def test_what_prints_a_result_prints_json_and_what_works_can_be_quiet(name: str) -> None:
    names = {parameter.name for parameter in LEAVES[name].params}
    if name != "completion":
        assert "as_json" in names
    if name not in ("completion", "doctor", "inspect", "plan", "targets"):  # those only print
        assert "quiet" in names


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_no_option_is_overwritten_silently(name: str, option: click.Option) -> None:
    """Given twice, it either takes both or is refused."""
    assert not option.count
    if option.multiple:
        return
    typed = option.opts[-1]
    value = [] if option.is_flag else ["1"]
    line = refused(*arguments(name), typed, *value, typed, *value)
    assert "is given twice; it takes one value" in line and f"'seekforge {name} --help'" in line
    for off in option.secondary_opts:
        assert "is given twice" in refused(*arguments(name), typed, off)


NUMBERS = [
    param
    for param in OPTIONS
    for kind in [param.values[1].type]
    if isinstance(kind.inner if isinstance(kind, Listed) else kind, Whole | Number)
]


def test_no_number_has_a_type_without_bounds() -> None:
    for param in OPTIONS:
        kind = param.values[1].type
        assert not isinstance(kind, click.types.IntParamType | click.types.FloatParamType), param.id
    assert len(NUMBERS) > 40


NO_NUMBERS = ("nan", "inf", "1e999", "9" * 30, "9" * 5000, "１", "", "x", "0x10", "1_0", "--1")


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_that_is_none_is_one_line(name: str, option: click.Option) -> None:
    kind = option.type.inner if isinstance(option.type, Listed) else option.type
    for value in NO_NUMBERS:
        if isinstance(kind, Number) and value == "9" * 30 and kind.most == float("inf"):
            continue  # a finite number
        line = refused(*arguments(name), f"{option.opts[0]}={value}")
        assert option.opts[0] in line and len(line) < 400, (value[:40], line)


@pytest.mark.parametrize(
    "args",
    [
        ("build", "p", "o", "--target", "cpu", "--max-model-len", "{}"),
        ("build", "p", "o", "--target", "cpu", "--max-num-batched-tokens", "{}"),
        ("run", "e", "--prompt", "a", "--max-tokens", "{}"),
        ("run", "e", "--prompt", "a", "--max-model-len", "{}"),
        ("bench", "e", "--contexts", "{},8"),
        ("bench", "e", "--max-tokens", "{}"),
        ("dump", "e", "o", "--contexts", "{}"),
        ("parity", "e", "--contexts", "{}"),
        ("plan", "full", "--contexts", "{}"),
    ],
    ids=lambda args: " ".join((args[0], args[-2])),
)
def test_tokens_are_written_alike_everywhere(args: tuple[str, ...]) -> None:
    found = []
    for text in ("64K", "64k", "65536"):
        command = LEAVES[args[0]]
        context = command.make_context(args[0], [arg.format(text) for arg in args[1:]])
        name = next(p.name for p in command.params if p.opts[0] == args[-2])
        found.append(context.params[name or ""])
    assert found[0] == found[1] == found[2] and (found[0] == 65536 or found[0][0] == 65536)


def test_lists_are_given_with_commas_or_several_times() -> None:
    command = LEAVES["kernels build"]
    for args in (["--sm", "80,90"], ["--sm", "80", "--sm", "90"], ["--sm", "80,90", "--sm", "80"]):
        assert command.make_context("build", ["out", *args]).params["sms"] == (80, 90)


def test_bare_commands_print_their_help() -> None:
    for args in ((), ("kernels",)):
        result = invoke(*args)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith("Usage: seekforge") and "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) > 5 and "error:" not in result.stderr


def complete(*words: str) -> list[str]:
    line = " ".join(("seekforge", *words))
    env = {"COMP_WORDS": line, "COMP_CWORD": str(len(words)), "_SEEKFORGE_COMPLETE": "bash_complete"}
    result = CliRunner(env=env).invoke(cli.main, [], prog_name="seekforge")
    return [entry.partition(",")[2] for entry in result.output.splitlines()]


def test_the_shell_completes_commands_targets_and_models() -> None:
    assert complete("ex") == ["export"] and "new-checkpoint" in complete("")
    assert complete("build", "p", "o", "--target", "h2") == ["h20", "h200"]
    assert complete("plan", "full", "--target", "h20,b2") == ["h20,b200"]
    assert complete("plan", "fu") == ["full"] and "tiny" in complete("new-checkpoint", "o", "--preset", "")
    assert "--kv-cache-dtype" in complete("plan", "full", "--kv")


def test_completing_a_command_imports_nothing_heavy() -> None:
    script = (
        "import sys, os\nfrom seekforge.runtime.cli.main import main\n"
        "os.environ |= {'COMP_WORDS': 'seekforge ', 'COMP_CWORD': '1', '_SEEKFORGE_COMPLETE': 'bash_complete'}\n"
        "try: main([])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'onnx', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "plain,build" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(shell: str) -> None:
    text = invoke("completion", shell).stdout
    assert "_SEEKFORGE_COMPLETE" in text and shell in text


#: Runs each command in a process that ends as any does: forked, after what all of them import was imported.
_RUN_EACH = """
import os, sys
from pathlib import Path
from seekforge.runtime.cli.main import main
codes = []
for line in sys.argv[2:]:
    child = os.fork()
    if not child:
        sys.argv = ["seekforge", *line.split()]
        sys.exit(main())
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
Path(sys.argv[1]).write_text(" ".join(map(str, codes)))
os._exit(0)
"""


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", ">/dev/full"])
def test_streams_that_take_nothing_are_no_traceback(redirect: str, tmp_path: Path) -> None:
    lines = ["targets", "targets --json", "plan full --target h200", "doctor", "inspect /nowhere", "completion bash"]
    words = [sys.executable, "-c", _RUN_EACH, str(tmp_path / "codes"), *lines]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = ["bash", "-c", f"{shlex.join(words)} {redirect}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    codes = (tmp_path / "codes").read_text().split()
    failed = {line for line, code in zip(lines, codes, strict=True) if code != "0"}
    assert failed == (set(lines) if "full" in redirect else {"inspect /nowhere"}), (codes, done.stderr)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_of_another_encoding_gets_every_command(encoding: str, tmp_path: Path) -> None:
    script = """
import shlex, sys
from seekforge.runtime.cli.main import main
for line in sys.argv[1:]:
    sys.argv = ["seekforge", *shlex.split(line)]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (line, end.code)
    print("done:", line, flush=True)
"""
    lines = ["targets", "plan full", "plan full --target h200 --json", "doctor", "--help"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, check=False, env=env)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    text = done.stdout.decode(encoding)
    assert [line for line in text.splitlines() if line.startswith("done:")] == [f"done: {line}" for line in lines]


def test_plan_is_short_and_says_more_when_asked() -> None:
    short = invoke("plan", "full").stdout
    assert len(short.splitlines()) < 30 and "--all" in short
    assert len(re.findall(r"\bh200\b", short)) == 1
    assert len(invoke("plan", "full", "--all").stdout.splitlines()) > 100
    both = invoke("plan", "full", "--contexts", "8K").stdout
    assert len(re.findall(r"\bh200\b", both)) == 2  # FP8 and BF16
